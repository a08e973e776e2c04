"""Worker processes over real sockets, with the test as their scheduler."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm.checkpoint import ModelConfig
from nanovllm.control import Ready, Report, ToSupervisor, WorkerStats
from nanovllm.exit_codes import EXIT_FOLLOWED, EXIT_MISCONFIGURED
from nanovllm.messages import (
    Admission,
    GroupReady,
    Reset,
    StepResult,
    WorkerToScheduler,
    pack,
)
from nanovllm.service import REASON_PREFIX
from nanovllm.services.gpu_worker import startup
from nanovllm.services.gpu_worker.model.parallel import TensorParallel
from nanovllm.transport.links import Up
from tests.checkpoints import write_checkpoint
from tests.gpu_worker.paged import CPU
from tests.gpu_worker.plans import GREEDY, Request, outputs, random_schedule, step_plan
from tests.peer import Neighbourhood


class Group(Neighbourhood):
    """The processes of one group."""

    def __init__(self, **options: Any) -> None:
        limits = {"max_num_seqs": 8, "max_model_len": 96, "kvcache_block_size": 16}
        super().__init__(**limits | options)
        control, scheduler = self.settings.control_endpoint, self.settings.scheduler_endpoint(0)
        self.supervisor = self.binds("supervisor", control, list[ToSupervisor])
        self.scheduler = self.binds("scheduler", scheduler, list[WorkerToScheduler])
        size = self.settings.tensor_parallel_size
        self.ranks = [self.start("gpu_worker", rank) for rank in range(size)]

    def serve(self, number: int = 0) -> GroupReady:
        """The handshake."""
        ready = self.scheduler.expect(GroupReady)
        self.scheduler.send(Reset(number))
        return ready


@pytest.fixture
def start() -> Iterator[Callable[..., Group]]:
    with contextlib.ExitStack() as groups:

        def start_group(**options: Any) -> Group:
            return groups.enter_context(Group(**options))

        yield start_group


@pytest.fixture(scope="module")
def cpu_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cpu"))


def admit(slot: int, tokens: int = 3) -> Admission:
    return Admission(slot, pack(range(tokens)), tokens, pack([slot]), 0, GREEDY)


def steps(report: Report) -> int:
    assert isinstance(report.stats, WorkerStats)
    return report.stats.steps


def test_handshake_plans_results_and_a_link_made_anew(start: Callable[..., Group]) -> None:
    group = start(device="sim", sim_step_ms=0.1, num_kvcache_blocks=33)
    scheduler = group.scheduler
    assert scheduler.expect(Up).peer.role == "gpu_worker"
    assert scheduler.expect(GroupReady) == GroupReady(33, 16)
    assert group.serve(number=5) == GroupReady(33, 16), "repeated until a reset comes"
    scheduler.send(
        step_plan(4, decode=[7]),
        step_plan(5, admit=[admit(1)], prefill=[(1, 0, 3)]),
        step_plan(5, decode=[1]),
        step_plan(6, decode=[1]),
    )
    first, second = scheduler.expect(StepResult), scheduler.expect(StepResult)
    assert (first.number, second.number) == (5, 6)
    assert len(first.token_ids) == len(second.token_ids) == 4
    assert second.busy_us - first.busy_us == 100

    scheduler.come_back(reborn=False)
    assert scheduler.expect(StepResult) == first
    assert scheduler.expect(StepResult) == second
    scheduler.send(step_plan(6, decode=[1]), step_plan(7, decode=[1]))
    third = scheduler.expect(StepResult)
    assert third.number == 7

    scheduler.come_back(reborn=True)
    group.serve(number=100)
    scheduler.send(step_plan(100, admit=[admit(1)], prefill=[(1, 0, 3)]))
    again = scheduler.expect(StepResult)
    assert again.number == 100
    assert again.token_ids == first.token_ids
    assert again.busy_us > third.busy_us

    stats = group.supervisor.expect(Report, lambda report: steps(report) == 4).stats
    assert stats == WorkerStats(slots_used=1, in_flight=0, steps=4, busy_s=again.busy_us / 1e6)
    assert again.busy_us == 400


# Holds the interpreter's lock, as the loading of a library does.
NEVER_IMPORTED = "import ctypes; ctypes.PyDLL(None).pause()"


def test_it_says_hello_before_it_imports_torch(
    start: Callable[..., Group], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text(NEVER_IMPORTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    group = start(device="cpu")
    assert group.supervisor.expect(Up).peer.role == "gpu_worker"


# Waits for the test, and leaves the interpreter's lock to others.
IMPORTED_SLOWLY = "open(f'{__file__}.fifo').read(); raise ImportError('no torch here')"


def test_it_reports_while_it_imports_torch(
    start: Callable[..., Group], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text(IMPORTED_SLOWLY)
    os.mkfifo(tmp_path / "torch.py.fifo")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    group = start(device="cpu")
    group.supervisor.expect(Report)
    group.supervisor.expect(Report)
    (tmp_path / "torch.py.fifo").write_text("go on")
    code, output = group.ended(group.ranks[0])
    assert code == 1
    assert "ImportError: no torch here" in output


def test_it_ends_when_told_to(start: Callable[..., Group]) -> None:
    group = start(device="sim", tensor_parallel_size=2, sim_step_ms=60_000, log_level="warning")
    group.serve()
    group.scheduler.send(step_plan(0))
    for rank in group.ranks:
        rank.send_signal(signal.SIGTERM)
    assert group.ended(group.ranks[0]) == (0, "")
    code, output = group.ended(group.ranks[1])
    # Rank 0 may be gone before the signal comes.
    assert (code, output) == (0, "") or "gpu_worker 0.0 is gone" in output
    left = {path.name for path in group.runtime_dir.iterdir()}
    assert not {name for name in left if name.startswith("workers")}


def test_a_simulated_group_lives_and_dies_as_one(start: Callable[..., Group]) -> None:
    group = start(device="sim", tensor_parallel_size=2, sim_step_ms=0.1)
    group.serve()
    group.scheduler.send(step_plan(0, admit=[admit(2)], prefill=[(2, 0, 3)]))
    assert group.scheduler.expect(StepResult).number == 0
    # A rank that does not know its rank 0 yet goes on waiting for it.
    group.supervisor.expect(Report, lambda report: steps(report) == 1, index=1)
    group.ranks[0].kill()
    code, output = group.ended(group.ranks[1])
    assert code == EXIT_FOLLOWED
    assert "gpu_worker 0.0 is gone" in output


def test_two_ranks_sample_what_one_does(start: Callable[..., Group], cpu_model: Path) -> None:
    group = start(model=str(cpu_model), device="cpu", tensor_parallel_size=2, num_kvcache_blocks=40)
    rng = random.Random(0)
    requests = [Request(rng.choices(range(515), k=n), 8) for n in (1, 5, 17, 40, 33)]
    schedule = random_schedule(
        requests, rng, slots=8, blocks=40, block_size=16, largest_chunk=20, first=3
    )
    assert group.serve(number=3) == GroupReady(40, 16)
    results = []
    for plan, _ in schedule:
        group.scheduler.send(plan)
        if plan.number > 3:
            results.append(group.scheduler.expect(StepResult))
    results.append(group.scheduler.expect(StepResult))

    config = ModelConfig.from_checkpoint(cpu_model)
    alone, _ = startup.load(
        cpu_model, config, group.settings, CPU, TensorParallel(), lambda *_: None
    )
    expected = [alone.step(plan).result(0, 0) for plan, _ in schedule]
    assert outputs(schedule, results, 5) == outputs(schedule, expected, 5)

    assert group.supervisor.expect(Ready).detail.startswith("cpu, float32, sdpa attention")

    group.ranks[1].kill()
    code, output = group.ended(group.ranks[0])
    assert code == EXIT_FOLLOWED
    assert "gpu_worker 0.1 is gone" in output


def test_a_failing_step_ends_the_process_with_its_traceback(
    start: Callable[..., Group], cpu_model: Path
) -> None:
    group = start(model=str(cpu_model), device="cpu", num_kvcache_blocks=40)
    group.serve()
    group.scheduler.send(step_plan(0, decode=[8]))
    code, output = group.ended(group.ranks[0])
    assert code == 1
    assert "IndexError" in output
    assert "executor.py" in output


@pytest.mark.parametrize("device", ["sim", "cpu"])
def test_too_little_memory_is_one_clear_line(
    start: Callable[..., Group], cpu_model: Path, device: str
) -> None:
    model = {} if device == "sim" else {"model": str(cpu_model)}
    group = start(device=device, num_kvcache_blocks=2, **model)
    code, output = group.ended(group.ranks[0])
    assert code == EXIT_MISCONFIGURED
    (line,) = output.splitlines()
    assert f"{REASON_PREFIX}not enough memory for one sequence: there is room for" in line
