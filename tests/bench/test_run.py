"""The loop, its client, and what a person sees meanwhile."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from nanovllm.bench import prompts
from nanovllm.bench.arrivals import Arrival, Trace
from nanovllm.bench.client import SocketClient
from nanovllm.bench.load import Load
from nanovllm.bench.plot import plot
from nanovllm.bench.prompts import Shape, Turn, random_conversations, random_ids
from nanovllm.bench.run import SENT_AT_ONCE, drive
from nanovllm.bench.show import RECENT, Watch
from nanovllm.bench.work import Lengths
from nanovllm.client.results import PipelineUnavailable
from nanovllm.protocol import Delta, Finish, Generate, Sampling, ServerMessage, Usage

SCHEDSTAT = Path("/proc/thread-self/schedstat")


class Answering:
    """Ends every request with the next `receive`."""

    def __init__(self) -> None:
        self.sent: list[list[Generate]] = [[]]  # between two calls of `receive`

    def submit(self, request: Generate) -> None:
        self.sent[-1].append(request)

    def receive(self, until: float) -> Sequence[ServerMessage]:
        came = [Finish(request.id, "length", Usage(1, 1, 0)) for request in self.sent[-1]]
        self.sent.append([])
        return came


def test_answers_are_read_and_lateness_is_noted_in_the_middle_of_a_burst() -> None:
    trace = [Arrival(0.0)] * (3 * SENT_AT_ONCE)
    shape = Shape(Lengths(3, 3), Lengths(1, 1))
    load = Load(
        Trace(trace, 0.0), random_conversations(0, shape, Sampling(), trace), time.monotonic()
    )
    client = Answering()
    drive(load, client)
    assert [len(sent) for sent in client.sent] == [SENT_AT_ONCE] * 3 + [0]
    assert len({record.sent_s for record in load.records}) == 3


def test_a_server_that_has_gone_before_the_first_request_is_told() -> None:
    gone = pytest.raises(PipelineUnavailable, match="is gone")
    with SocketClient("ipc:///nowhere/ingress.sock") as client, gone:
        client.receive(time.monotonic() + 30)


def test_a_prefix_is_drawn_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def noting(draw: np.random.Generator, length: int) -> list[int]:
        drawn.append(length)
        return random_ids(draw, length)

    monkeypatch.setattr(prompts, "random_ids", noting)
    shape = Shape(Lengths(3, 3), Lengths(1, 1), shared_prefix=8, prefixes=100)
    next(random_conversations(0, shape, Sampling()))
    assert drawn == [8, 3]


def test_the_bar_shows_the_first_tokens_of_an_overloaded_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The latest requests have none."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    load = Load(Trace([], 0.0), [], 0.0)
    first, *_ = (load.add([Turn([1], Sampling())], 0.0) for _ in range(RECENT + 2))
    load.take([Delta(first.id, 0, [1], "")], 0.25)
    with Watch(load, None, math.inf) as watch:
        watch.tick()
    assert "first token 250.0 ms" in capsys.readouterr().err


@pytest.mark.skipif(not SCHEDSTAT.exists(), reason="this kernel does not count the wait")
def test_the_loops_wait_for_a_core_is_counted() -> None:
    cores = os.sched_getaffinity(0)
    core = min(cores)
    spin = f"import os; os.sched_setaffinity(0, {{{core}}}); print(flush=True)\nwhile True: pass"
    with (
        subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as other,
        Watch(Load(Trace([], 0.0), [], 0.0), None, math.inf) as watch,
    ):
        try:
            assert other.stdout is not None
            other.stdout.readline()
            os.sched_setaffinity(0, {core})
            watch.tick()
            began = time.thread_time()
            while time.thread_time() < began + 0.1:
                pass
            watch.tick()
        finally:
            os.sched_setaffinity(0, cores)
            other.kill()
    first, last = watch.used
    assert last.loop_s - first.loop_s > last.cpu_s - first.cpu_s + 0.02


def test_a_models_name_is_no_formula(tmp_path: Path) -> None:
    plot([], tmp_path / "run.png", r"$\model$ at tcp://here")
    assert (tmp_path / "run.png").exists()
