"""Neither a service nor the launcher waits for a reader of the log."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from benchmarks.support.pipeline import (
    END_TIMEOUT_S,
    LOOK_AGAIN_S,
    READY_TIMEOUT_S,
    Pipeline,
)
from nanovllm import Client, PipelineUnavailable, SamplingParams
from nanovllm.client.control import Control
from nanovllm.control import ServiceStatus
from nanovllm.output import PIPE_BYTES, lossy, output_pipe

SIM = ("--device", "sim", "--sim-step-ms", "1", "--max-num-seqs", "8")
NOISE = Path(__file__).parent / "noise"
PARAMS = SamplingParams(max_tokens=200, ignore_eos=True)


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setenv("PYTHONPATH", str(NOISE), prepend=os.pathsep)
    monkeypatch.setenv("NANOVLLM_TEST_NOISE", request.param)


def read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, PIPE_BYTES)
    except BlockingIOError:
        return b""


def test_unread_lines_are_lost_counted_and_reported_later() -> None:
    read_end, write_end = output_pipe()
    stream = lossy(sys.__stdout__ or sys.stdout, write_end)
    got, lines = b"", 0
    for size in (10, 5_000, 70_000, 1):
        for _ in range(2 * PIPE_BYTES // (size + 100)):
            stream.write(f"<{'x' * size}>\n")
            lines += 1
        got += read(read_end)
        stream.flush()
    stream.write("the last one\n")
    *kept, last, nothing = (got + read(read_end)).decode().split("\n")
    assert (last, nothing) == ("the last one", "")
    notices = [re.fullmatch(r"(\d+) lines? of output lost here.*", line) for line in kept]
    lost = [int(notice[1]) for notice in notices if notice]
    assert len(lost) < 20, "one notice tells of many lines"
    # Of a line that is cut, the end is lost.
    assert sum(line.startswith("<") and line.endswith(">") for line in kept) + sum(lost) == lines
    os.close(read_end)
    os.close(write_end)


@pytest.mark.parametrize("noise", ["scheduler:log", "detokenizer:log"], indirect=True)
@pytest.mark.usefixtures("noise")
def test_no_service_waits_for_a_launcher_that_is_stopped() -> None:
    with Pipeline("", *SIM) as pipeline, Client(pipeline.endpoint, timeout=60) as client:
        os.kill(pipeline.process.pid, signal.SIGSTOP)
        try:
            for _ in range(5):
                assert len(client.generate([5], PARAMS).token_ids) == 200
        finally:
            os.kill(pipeline.process.pid, signal.SIGCONT)
        pipeline.wait_for("lines of output lost here", END_TIMEOUT_S)


@pytest.fixture
def unread(tmp_path: Path) -> Iterator[Path]:
    """The runtime directory of a pipeline whose output no process reads."""
    path = tmp_path / "run"
    launch = [sys.executable, "-m", "nanovllm.launch.cli", "--runtime-dir", str(path)]
    launcher = subprocess.Popen(
        [*launch, "--ingress", "", "--http", "", *SIM],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    yield path
    launcher.terminate()
    try:
        assert launcher.wait(END_TIMEOUT_S) == 0
    finally:
        launcher.kill()
        assert launcher.stdout is not None
        launcher.stdout.close()


def services_once(path: Path, wanted: Callable[[list[ServiceStatus]], bool]) -> list[ServiceStatus]:
    """What the supervisor says, once it is `wanted`."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    found: list[ServiceStatus] = []
    while not wanted(found):
        assert time.monotonic() < deadline, found
        time.sleep(LOOK_AGAIN_S)
        with contextlib.suppress(PipelineUnavailable), Control(str(path)) as control:
            found = control.status().services
    return found


@pytest.mark.parametrize(
    "noise", ["scheduler:log", "tokenizer:lines", "tokenizer:line"], indirect=True
)
@pytest.mark.usefixtures("noise")
def test_a_launcher_whose_output_nobody_reads_supervises(unread: Path) -> None:
    def ready(services: list[ServiceStatus], restarts: int) -> bool:
        states = [service.state for service in services]
        return states == ["ready"] * 5 and sum(s.restarts for s in services) == restarts

    services = services_once(unread, partial(ready, restarts=0))
    with Client(f"ipc://{unread}/ingress.sock", timeout=60) as client:
        for restarts in (1, 2):
            assert len(client.generate([5], PARAMS).token_ids) == 200
            os.kill(services[-1].pid, signal.SIGKILL)
            services = services_once(unread, partial(ready, restarts=restarts))
