"""The container image, where a builder runs: it serves without root, on a file system that cannot
be written."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]
IMAGE = "nanovllm:cpu"
BUILD_TIMEOUT_S = 1800
FILE = TREE / "deploy" / "container" / "Containerfile"
BASE = "".join(re.findall(r"^ARG BASE=.*\n", FILE.read_text(), re.MULTILINE)) + "FROM ${BASE}\n"
# The same by hand, where the image is mounted: not every builder runs it with a read-only root.
READ_ONLY = """
set -e
user="$1" && shift
mount --rbind "$0" "$0" && mount -o remount,ro,bind "$0"
mount -t tmpfs -o mode=1777 tmpfs "$0/tmp"
mount -t proc proc "$0/proc"
for device in null zero random urandom; do mount --bind /dev/$device "$0/dev/$device"; done
exec chroot --userspec="$user" "$0" env -i HOME=/tmp "$@"
"""

pytestmark = pytest.mark.timeout(BUILD_TIMEOUT_S)


def run(*words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=TREE, input=text, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Builds the image; what stands before a command that runs in it, read-only but for /tmp."""
    builder = os.environ.get("BUILDER")
    if builder is None:
        pytest.skip("the image takes minutes to build: `make test-image` does")
    if not builder:
        pytest.skip("no podman, docker or buildah that works is here to build the image")
    by_hand = Path(builder).name == "buildah"
    if by_hand and os.geteuid() != 0:
        pytest.skip("buildah has no read-only root, and only root can mount its images")
    options = os.environ.get("BUILD_OPTIONS", "")
    nothing = str(tmp_path_factory.mktemp("nothing"))
    fetched = run(builder, "build", *shlex.split(options), "-f", "-", nothing, text=BASE)
    if fetched.returncode:
        why = fetched.stderr.strip().rpartition("\n")[2]
        pytest.skip(f"{builder} cannot get the base image: {why}")
    words = [f"BUILDER={builder}", f"BUILD_OPTIONS={options}", "VARIANT=cpu"]
    built = run("make", "image", *words)
    assert built.returncode == 0, (built.stdout + built.stderr)[-4000:]
    if not by_hand:
        yield [builder, "run", "--rm", "--read-only", "--tmpfs", "/tmp", IMAGE]
        return
    container = run(builder, "from", "--pull-never", IMAGE).stdout.strip()
    try:
        root = run(builder, "mount", container).stdout.strip()
        config = json.loads(run(builder, "inspect", IMAGE).stdout)["OCIv1"]["config"]
        as_made = [config["User"], *config["Env"], *config["Entrypoint"]]
        yield ["unshare", "--mount", "sh", "-c", READ_ONLY, root, *as_made]
    finally:
        run(builder, "rm", container)


def python(inside: list[str], code: str) -> list[str]:
    """The lines that a program prints in the image."""
    ran = run(*inside, "python", "-c", code)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_nothing_but_tmp_can_be_written_and_nobody_is_root(inside: list[str]) -> None:
    code = (
        "import os, pathlib, tempfile, nanovllm\n"
        "print(os.getuid(), os.getgid(), tempfile.gettempdir())\n"
        "for place in ('/', '/etc', '/opt', os.path.dirname(nanovllm.__file__)):\n"
        "    try:\n"
        "        pathlib.Path(place, 'written').touch()\n"
        "    except OSError as error:\n"
        "        print(place.startswith('/'), error.strerror)\n"
    )
    who, *refused = python(inside, code)
    assert who == "10001 10001 /tmp"
    assert refused == ["True Read-only file system"] * 4


def test_it_has_what_a_cpu_needs_and_no_more(inside: list[str]) -> None:
    code = (
        "import importlib.util, torch\n"
        "from nanovllm import LLM, SamplingParams\n"
        "print(importlib.util.find_spec('triton'))\n"
        "with LLM() as llm:\n"
        "    (output,) = llm.generate(['Once upon a time'], SamplingParams(max_tokens=5))\n"
        "print(len(output['token_ids']))\n"
    )
    assert python(inside, code) == ["None", "5"]


def test_the_launcher_ends_on_sigterm(inside: list[str]) -> None:
    words = (*inside, "nanovllm-launch", "--ingress", "", "--http", "")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        try:
            said = next((line for line in launcher.stdout if "nanovllm serves" in line), "")
            assert said, "the launcher has ended"
            launcher.send_signal(signal.SIGTERM)
            launcher.stdout.read()
            assert launcher.wait() == 0
        finally:
            launcher.kill()
