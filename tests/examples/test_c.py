"""The C example, built and run as a person would."""

from __future__ import annotations

import os
import shutil
import signal
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.support.pipeline import END_TIMEOUT_S, Pipeline
from nanovllm import Client, SamplingParams
from nanovllm.control import IngressStats
from nanovllm.keys import make_keys
from nanovllm.names import ServiceId
from tests.keys.bad_network import bad_network
from tests.keys.locked import Locked, locked_pipeline
from tests.recovery.streams import services

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "c"
PROMPT = "Once upon a time"


def libraries_missing() -> str | None:
    """What the example cannot be built without; None if everything is there."""
    if shutil.which("make") is None or shutil.which("cc") is None:
        return "make or a C compiler is missing"
    headers = ["cc", "-E", "-include", "zmq.h", "-include", "msgpack.h", "-x", "c", os.devnull]
    if subprocess.run(headers, capture_output=True, check=False).returncode:
        return "libzmq or msgpack-c is missing: see examples/c/README.md"
    return None


MISSING = libraries_missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, with every check of memory that the compiler knows."""
    directory = tmp_path_factory.mktemp("c") / "c"
    shutil.copytree(EXAMPLE, directory, ignore=shutil.ignore_patterns("complete"))
    flags = "CFLAGS=-O1 -g -Werror -fsanitize=address,undefined -fno-sanitize-recover"
    subprocess.run(["make", flags], cwd=directory, check=True, timeout=END_TIMEOUT_S)
    return directory / "complete"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    with locked_pipeline(tmp_path_factory.mktemp("locked") / "keys") as running:
        yield running


def environment(endpoint: str, keys: str = "") -> dict[str, str]:
    return {**os.environ, "NANOVLLM_ENDPOINT": endpoint, "NANOVLLM_KEYS": keys}


def complete(
    program: Path, endpoint: str, *words: str, keys: str = ""
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [program, PROMPT, *words],
        env=environment(endpoint, keys),
        capture_output=True,
        timeout=100,
        check=False,
    )


def test_it_streams_a_completion_and_tells_mistakes(built: Path, pipeline: Pipeline) -> None:
    with Client(pipeline.endpoint) as client:
        whole = client.generate(PROMPT, SamplingParams(temperature=1.0, max_tokens=5))
    ran = complete(built, pipeline.endpoint, "5")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout
    assert b": %d + " % whole.usage.prompt_tokens in ran.stderr
    wrong = complete(built, pipeline.endpoint, "0")
    assert (wrong.returncode, wrong.stdout) == (1, b"")
    assert b"max_tokens" in wrong.stderr
    assert subprocess.run([built], capture_output=True, check=False).returncode == 2


def test_ctrl_c_aborts(built: Path, locked: Locked) -> None:
    with subprocess.Popen(
        [built, PROMPT, "4000", "7"],
        env=environment(locked.pipeline.endpoint),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # `communicate` reads what `read` has left
    ) as running:
        assert running.stdout is not None
        assert running.stdout.read(1)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=END_TIMEOUT_S)
    assert running.returncode == 130, said
    assert b"\n[abort: " in said or b"\n[stop: " in said
    locked.pipeline.stats_once(IngressStats, lambda stats: stats.requests == 0)


def test_it_goes_on_where_its_connection_was_cut(built: Path, locked: Locked) -> None:
    local = complete(built, locked.pipeline.endpoint, "300", "7")
    assert local.returncode == 0, local.stderr
    # The handshake takes some 300 bytes. On a busy machine few frames hold the whole answer.
    with bad_network(locked.port, (1000,)) as proxy:
        cut = complete(built, proxy.endpoint, "300", "7", keys=locked.client_key("cut"))
        assert proxy.cuts == []
    assert cut.returncode == 0, cut.stderr
    assert cut.stdout == local.stdout
    assert cut.stderr == b"[disconnected; going on]\n" + local.stderr


def test_it_goes_on_when_the_ingress_has_started_anew(built: Path, locked: Locked) -> None:
    keys = locked.client_key("anew")
    whole = complete(built, locked.endpoint, "300", "7", keys=keys)
    with subprocess.Popen(
        [built, PROMPT, "300", "7"],
        env=environment(locked.endpoint, keys),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # `communicate` reads what `read` has left
    ) as running:
        assert running.stdout is not None
        first = running.stdout.read(1)
        services(locked.pipeline)[ServiceId("ingress")].kill()
        rest, said = running.communicate(timeout=END_TIMEOUT_S)
    assert running.returncode == 0, said
    assert said.startswith(b"[disconnected; going on]\n")
    assert first + rest == whole.stdout


def test_it_says_when_nobody_lets_it_in(built: Path, locked: Locked) -> None:
    keys = locked.client_key("taken")
    assert complete(built, locked.endpoint, "1", keys=keys).returncode == 0
    locked.take_back("taken")
    for endpoint, given, why in (
        (locked.endpoint, keys, b"does not take this client's key"),
        (locked.endpoint, "", b"wants a key (see NANOVLLM_KEYS)"),
        (locked.endpoint, os.devnull, b"is no client's key"),
    ):
        ran = complete(built, endpoint, keys=given)
        assert ran.returncode == 1
        assert why in ran.stderr
        assert ran.stdout == b""


def test_it_says_when_nothing_answers(built: Path, locked: Locked, tmp_path: Path) -> None:
    """Or when what answers knows another key than this client thinks."""
    source = (built.parent / "complete.c").read_text()
    (tmp_path / "complete.c").write_text(source.replace("10000", "300"))
    shutil.copy(built.parent / "Makefile", tmp_path)
    subprocess.run(["make", "CFLAGS=-O2 -Werror"], cwd=tmp_path, check=True, timeout=END_TIMEOUT_S)
    (*_, others) = make_keys(tmp_path / "others", "c")
    # Ends each connection at once, as an ingress with keys may before a client has read why.
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as closing:
        threading.Thread(target=closing.serve_forever, daemon=True).start()
        for endpoint, keys, why in (
            (f"ipc://{tmp_path}/none.sock", "", b"nothing answers"),
            (locked.endpoint, str(others), b"does NANOVLLM_KEYS name another pipeline's key?"),
            (f"tcp://127.0.0.1:{closing.server_address[1]}", "", b"wants a key"),
        ):
            ran = complete(tmp_path / "complete", endpoint, keys=keys)
            assert (ran.returncode, ran.stdout) == (1, b"")
            assert why in ran.stderr
        closing.shutdown()
