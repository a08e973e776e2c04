"""deploy/container: the Containerfile is well made, and is what the pods are made for."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.manifests import Pod, pods

TREE = Path(__file__).parents[2]
FILE = TREE / "deploy" / "container" / "Containerfile"
TEXT = FILE.read_text()


def test_the_linter_finds_no_fault() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    ran = subprocess.run(
        [hadolint, "--no-color", FILE], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_the_linter_would_find_one() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    worse = TEXT.replace("USER 10001:10001", "USER root")
    ran = subprocess.run([hadolint, "-"], input=worse, capture_output=True, text=True, check=False)
    assert "DL3002" in ran.stdout


@pytest.mark.parametrize("pod", pods("cpu") + pods("gpu"), ids=lambda p: f"{p.overlay}-{p.name}")
def test_pods_run_it_as_it_is_made(pod: Pod) -> None:
    (user,) = re.findall(r"^USER (\d+):(\d+)$", TEXT, re.MULTILINE)
    security = pod.spec["securityContext"]
    assert user == (str(security["runAsUser"]), str(security["runAsGroup"]))
    # What passes signals on is its entry point, and `args` come after it.
    assert 'ENTRYPOINT ["tini", "--"]' in TEXT
    assert "command" not in pod.container
    variant = pod.container["image"].partition(":")[2]
    assert f"AS runtime-{variant}" in TEXT
    if "http" in pod.ports:
        assert f"EXPOSE {pod.ports['http']}" in TEXT


def test_it_installs_what_is_in_the_tree(tmp_path: Path) -> None:
    """A wheel can be built of what is copied, and has every file."""
    for copied in re.findall(r"^COPY (?!--from)(.*) \S+$", TEXT, re.MULTILINE):
        for name in copied.split():
            source = TREE / name
            if source.is_dir():
                shutil.copytree(source, tmp_path / name, symlinks=True)
            else:
                shutil.copy2(source, tmp_path)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "dist"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "wheel", "zip")
    for folder in ("nanovllm", "services", "kernels", "launch"):
        for path in (TREE / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                name = path.relative_to(TREE / "nanovllm" if folder == "nanovllm" else TREE)
                assert (tmp_path / "wheel" / "nanovllm" / name).is_file(), name
