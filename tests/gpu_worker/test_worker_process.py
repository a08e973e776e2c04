"""Worker processes over real sockets, with the test as their scheduler."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import zmq

from nanovllm.checkpoint import ModelConfig
from nanovllm.control import Ready, Report, ToSupervisor, WorkerStats
from nanovllm.messages import (
    Admission,
    GroupReady,
    Message,
    Reset,
    StepResult,
    WorkerToScheduler,
    pack,
)
from nanovllm.options import settings_argv
from nanovllm.service import EXIT_FOLLOWED, EXIT_MISCONFIGURED, REASON_PREFIX
from nanovllm.services.gpu_worker import startup
from nanovllm.services.gpu_worker.model.parallel import TensorParallel
from nanovllm.settings import Settings
from nanovllm.transport.links import BoundLink, Down, Peer, Received, Up, new_incarnation
from tests.bpe import write_checkpoint_files
from tests.checkpoints import write_checkpoint
from tests.gpu_worker.paged import CPU
from tests.gpu_worker.plans import GREEDY, Request, outputs, random_schedule, step_plan

TIMEOUT_S = 60
T = TypeVar("T")


class Binder:
    """One side that workers connect to: the scheduler's, or the supervisor's."""

    def __init__(
        self, context: zmq.Context[Any], endpoint: str, role: str, inbound: type[list[Any]]
    ) -> None:
        self._context, self._endpoint, self._inbound = context, endpoint, inbound
        self._role = role
        self._me = Peer(role, 0, new_incarnation())
        self._events: list[Any] = []
        self._link = self._bind()

    def _bind(self) -> BoundLink[Any]:
        return BoundLink(self._context, self._endpoint, self._me, self._inbound)

    def make_anew(self, *, reborn: bool) -> None:
        """Breaks the connections; perhaps as another incarnation of the service."""
        self._link.close()
        if reborn:
            self._me = Peer(self._role, 0, new_incarnation())
        self._events.clear()
        self._link = self._bind()

    def next(self, wanted: Callable[[Any], T | None]) -> T:
        """What `wanted` makes of the first event from which it makes something; those before it
        are dropped."""
        poller = zmq.Poller()
        for socket in self._link.sockets:
            poller.register(socket, zmq.POLLIN)
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            while self._events:
                found = wanted(self._events.pop(0))
                if found is not None:
                    return found
            left = deadline - time.monotonic()
            assert left > 0, f"{wanted} did not come in {TIMEOUT_S} s"
            poller.poll(int(left * 1000) + 1)
            self._events += self._link.receive()

    def up(self) -> Peer:
        return self.next(lambda event: event.peer if isinstance(event, Up) else None)

    def message(self, kind: type[T]) -> T:
        def wanted(event: Any) -> T | None:
            assert not isinstance(event, Down), event
            if isinstance(event, Received) and isinstance(event.message, kind):
                return event.message
            return None

        return self.next(wanted)

    def send(self, *messages: Message) -> None:
        (peer,) = self._link.peers
        assert self._link.send(peer, messages)

    def close(self) -> None:
        self._link.close()


class Group:
    """The processes of one group, in a runtime directory of their own."""

    def __init__(self, model: Path, **options: Any) -> None:
        self.runtime_dir = Path(tempfile.mkdtemp(prefix="nv-"))
        self.settings = Settings(
            model=str(model),
            runtime_dir=str(self.runtime_dir),
            **{"max_num_seqs": 8, "max_model_len": 96, "kvcache_block_size": 16, **options},
        )
        self.context: zmq.Context[Any] = zmq.Context()
        self.supervisor = Binder(
            self.context, self.settings.control_endpoint, "supervisor", list[ToSupervisor]
        )
        self.scheduler = Binder(
            self.context, self.settings.scheduler_endpoint, "scheduler", list[WorkerToScheduler]
        )
        self.ranks = [self._start(rank) for rank in range(self.settings.tensor_parallel_size)]

    def _start(self, rank: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "nanovllm.services.gpu_worker", "--index", str(rank)]
        return subprocess.Popen(
            [*command, *settings_argv(self.settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ended(self, rank: int) -> tuple[int, str]:
        """Waits for a rank's end: its exit code, and what it wrote."""
        output, _ = self.ranks[rank].communicate(timeout=TIMEOUT_S)
        return self.ranks[rank].returncode, output

    def serve(self, number: int = 0) -> GroupReady:
        """The handshake."""
        ready = self.scheduler.message(GroupReady)
        self.scheduler.send(Reset(number))
        return ready

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.communicate()
        self.scheduler.close()
        self.supervisor.close()
        self.context.term()
        shutil.rmtree(self.runtime_dir)


@pytest.fixture
def start() -> Iterator[Callable[..., Group]]:
    groups: list[Group] = []

    def start_group(model: Path, **options: Any) -> Group:
        groups.append(Group(model, **options))
        return groups[-1]

    yield start_group
    for group in groups:
        group.close()


@pytest.fixture(scope="module")
def sim_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint_files(tmp_path_factory.mktemp("sim"))


@pytest.fixture(scope="module")
def cpu_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cpu"))


def admit(slot: int, tokens: int = 3) -> Admission:
    return Admission(slot, pack(range(tokens)), tokens, pack([slot]), 0, GREEDY)


def test_handshake_plans_results_and_a_link_made_anew(
    start: Callable[..., Group], sim_model: Path
) -> None:
    group = start(sim_model, device="sim", sim_step_ms=0.1, num_kvcache_blocks=33)
    scheduler = group.scheduler
    peer = scheduler.up()
    assert (peer.role, peer.index) == ("gpu_worker", 0)
    assert scheduler.message(GroupReady) == GroupReady(33, 16)
    assert group.serve(number=5) == GroupReady(33, 16), "repeated until a reset comes"
    scheduler.send(
        step_plan(4, decode=[7]),
        step_plan(5, admit=[admit(1)], prefill=[(1, 0, 3)]),
        step_plan(5, decode=[1]),
        step_plan(6, decode=[1]),
    )
    first, second = scheduler.message(StepResult), scheduler.message(StepResult)
    assert (first.number, second.number) == (5, 6)
    assert len(first.token_ids) == len(second.token_ids) == 4
    assert second.busy_us - first.busy_us == 100

    scheduler.make_anew(reborn=False)
    scheduler.up()
    assert scheduler.message(StepResult) == first
    assert scheduler.message(StepResult) == second
    scheduler.send(step_plan(6, decode=[1]), step_plan(7, decode=[1]))
    third = scheduler.message(StepResult)
    assert third.number == 7

    scheduler.make_anew(reborn=True)
    scheduler.up()
    group.serve(number=100)
    scheduler.send(step_plan(100, admit=[admit(1)], prefill=[(1, 0, 3)]))
    again = scheduler.message(StepResult)
    assert again.number == 100
    assert again.token_ids == first.token_ids
    assert again.busy_us > third.busy_us

    stats = group.supervisor.message(Report).stats
    while isinstance(stats, WorkerStats) and stats.steps < 4:
        stats = group.supervisor.message(Report).stats
    assert stats == WorkerStats(slots_used=1, in_flight=0, steps=4, busy_s=again.busy_us / 1e6)
    assert again.busy_us == 400


def test_it_ends_when_told_to(start: Callable[..., Group], sim_model: Path) -> None:
    group = start(
        sim_model, device="sim", tensor_parallel_size=2, sim_step_ms=60_000, log_level="warning"
    )
    group.serve()
    group.scheduler.send(step_plan(0))
    for rank in group.ranks:
        rank.send_signal(signal.SIGTERM)
    assert group.ended(0) == (0, "")
    code, output = group.ended(1)
    # Rank 0 may be gone before the signal comes.
    assert (code, output) == (0, "") or "gpu_worker 0 is gone" in output
    left = {path.name for path in group.runtime_dir.iterdir()}
    assert not {name for name in left if name.startswith("workers")}


def test_a_simulated_group_lives_and_dies_as_one(
    start: Callable[..., Group], sim_model: Path
) -> None:
    group = start(sim_model, device="sim", tensor_parallel_size=2, sim_step_ms=0.1)
    group.serve()
    group.scheduler.send(step_plan(0, admit=[admit(2)], prefill=[(2, 0, 3)]))
    assert group.scheduler.message(StepResult).number == 0
    group.ranks[0].kill()
    code, output = group.ended(1)
    assert code == EXIT_FOLLOWED
    assert "gpu_worker 0 is gone" in output


def test_two_ranks_sample_what_one_does(start: Callable[..., Group], cpu_model: Path) -> None:
    group = start(cpu_model, device="cpu", tensor_parallel_size=2, num_kvcache_blocks=40)
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
            results.append(group.scheduler.message(StepResult))
    results.append(group.scheduler.message(StepResult))

    config = ModelConfig.from_checkpoint(cpu_model)
    alone, _ = startup.load(
        cpu_model, config, group.settings, CPU, TensorParallel(), lambda *_: None
    )
    expected = [alone.step(plan).result(0, 0) for plan, _ in schedule]
    assert outputs(schedule, results, 5) == outputs(schedule, expected, 5)

    assert group.supervisor.message(Ready).detail.startswith("cpu, float32, sdpa attention")

    group.ranks[1].kill()
    code, output = group.ended(0)
    assert code == EXIT_FOLLOWED
    assert "gpu_worker 1 is gone" in output


def test_a_failing_step_ends_the_process_with_its_traceback(
    start: Callable[..., Group], cpu_model: Path
) -> None:
    group = start(cpu_model, device="cpu", num_kvcache_blocks=40)
    group.serve()
    group.scheduler.send(step_plan(0, decode=[8]))
    code, output = group.ended(0)
    assert code == 1
    assert "IndexError" in output
    assert "executor.py" in output


@pytest.mark.parametrize("device", ["sim", "cpu"])
def test_too_little_memory_is_one_clear_line(
    start: Callable[..., Group], sim_model: Path, cpu_model: Path, device: str
) -> None:
    model = sim_model if device == "sim" else cpu_model
    group = start(model, device=device, num_kvcache_blocks=2)
    code, output = group.ended(0)
    assert code == EXIT_MISCONFIGURED
    (line,) = output.splitlines()
    assert line.startswith(f"{REASON_PREFIX}not enough memory for one sequence: there is room for")
