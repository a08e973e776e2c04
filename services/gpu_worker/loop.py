"""The loop around a runner: rank 0 serves the scheduler, the other ranks follow rank 0.

Rank 0 passes every step plan on before it launches the plan itself, so all ranks run the same steps
in the same order. The other ranks answer nothing. The group ends when one rank does.
"""

from __future__ import annotations

import os
from functools import partial
from typing import NoReturn

from nanovllm.control import WorkerStats
from nanovllm.grammars import Grammars
from nanovllm.messages import (
    GroupReady,
    Keep,
    Message,
    Prepare,
    Prepared,
    Reset,
    SchedulerToWorker,
    StepPlan,
    StepResult,
    unpack_int64,
)
from nanovllm.service import RETRY_S, Service
from nanovllm.services.gpu_worker.dialogue import Dialogue, DialoguePhase
from nanovllm.services.gpu_worker.matchers import Preparer
from nanovllm.services.gpu_worker.runner import GroupBroken, Listening, Loaded, Progress, Runner
from nanovllm.transport.links import HEARTBEAT_S, BoundLink, Down, Event, Peer, Received, Up

# How often an OpenMP thread looks for work before it sleeps. Takes about 50 µs, as long as the gaps
# between the operations of a step.
SPINS = 3000


class Rendezvous(Message, tag="rendezvous"):
    """Rank 0 awaits the other ranks at this port of the loopback interface."""

    port: int


LeaderToFollower = Rendezvous | Reset | Keep | Prepare | StepPlan
FollowerToLeader = Prepared


def serve(service: Service) -> NoReturn:
    """Runs the rank whose number is `service.me.index`."""
    runner = _make_runner(service)
    preparer = Preparer(partial(Grammars.from_checkpoint, service.directory, service.config))
    role = (Leader if service.me.index == 0 else Follower)(service, runner, preparer)
    service.watch(runner.descriptor, role.take_reports)
    service.watch(preparer.descriptor, role.take_prepared)
    try:
        service.run(role.step, role.counts.stats)
    finally:
        service.close()


def _make_runner(service: Service) -> Runner:
    settings = service.settings
    if settings.device == "sim":
        from nanovllm.services.gpu_worker.sim import SimRunner
        from nanovllm.services.gpu_worker.sim_tokens import ordinary_tokens

        return SimRunner(settings, ordinary_tokens(service.directory, service.config))
    spin_briefly()
    service.greet()  # then torch is imported
    from nanovllm.services.gpu_worker.torch_runner import TorchRunner

    return TorchRunner(service.directory, service.config, settings, service.me.index)


def spin_briefly() -> None:
    """Makes OpenMP's threads sleep after a short wait, unless the user's environment says how.

    Call this before torch is imported, as a runner's thread does: later it has no effect.

    By default a thread of GNU's OpenMP spins for milliseconds before it sleeps. If other services
    need the cores, spinning threads take time from threads that have work, even from the thread
    that they wait for, and steps become ten times slower. Sleeping at once is slow as well: the
    system tends to put a thread that is woken at every operation on the waker's core.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


class Counts:
    """Counts this rank's steps, for its statistics."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._launched = 0
        self._steps = 0
        self._busy_us = 0

    def launched(self) -> None:
        self._launched += 1

    def finished(self, result: StepResult) -> None:
        self._steps += 1
        self._busy_us = result.busy_us

    def stats(self) -> WorkerStats:
        in_flight = self._launched - self._steps
        return WorkerStats(self._runner.slots_used, in_flight, self._steps, self._busy_us / 1e6)


class Leader:
    """Rank 0: takes plans from the scheduler, passes them on, runs them, and sends results."""

    def __init__(self, service: Service, runner: Runner, preparer: Preparer) -> None:
        self.counts = Counts(runner)
        self._service = service
        self._runner = runner
        self._dialogue = Dialogue(service.settings.pipeline_depth)
        self._preparer = preparer
        # Of each matcher in preparation, whether it failed at the ranks that have answered.
        self._answers: dict[int, dict[int, bool]] = {}
        self._prepared: list[Prepared] = []  # to be sent
        self._served: Peer | None = None  # the latest incarnation of the scheduler
        self._loaded: Loaded | None = None
        self._port: int | None = None
        self._next_announcement = 0.0
        self._followers: set[Peer] = set()
        self._num_followers = service.settings.tensor_parallel_size - 1
        self._workers: BoundLink[FollowerToLeader] | None = None
        if self._num_followers:
            self._workers = service.bind(
                service.settings.workers_endpoint(service.me.engine),
                list[FollowerToLeader],
                self._on_follower,
            )
        self._scheduler = service.connect(
            service.settings.scheduler_endpoint(service.me.engine),
            list[SchedulerToWorker],
            self._on_scheduler,
        )

    def take_reports(self) -> None:
        for report in self._runner.reports():
            match report:
                case StepResult():
                    self.counts.finished(report)
                    self._dialogue.finished(report)
                case Progress():
                    self._service.loading(*report)
                case Listening():
                    self._port = report.port
                    self._tell_followers(Rendezvous(report.port))
                case Loaded():
                    self._loaded = report
                    self._service.ready(report.detail)

    def take_prepared(self) -> None:
        for prepared in self._preparer.reports():
            self._rank_prepared(0, prepared)

    def step(self, now: float) -> float | None:
        """Sends results, or announces the group. Returns in how many seconds to call again at the
        latest; None: when an event comes."""
        if messages := [*self._prepared, *self._dialogue.unsent]:
            if self._scheduler.send(messages):
                self._prepared.clear()
                self._dialogue.sent()
            elif self._scheduler.peer is not None:
                return RETRY_S
        if self._dialogue.phase is not DialoguePhase.WAITING or not self._complete:
            return None
        if now >= self._next_announcement and self._loaded is not None:
            self._next_announcement = now + HEARTBEAT_S
            block_size = self._service.settings.kvcache_block_size
            self._scheduler.send([GroupReady(self._loaded.num_blocks, block_size)])
        return self._next_announcement - now

    @property
    def _complete(self) -> bool:
        """Whether the whole group can take plans."""
        return self._loaded is not None and len(self._followers) == self._num_followers

    def _on_scheduler(self, event: Event[SchedulerToWorker]) -> None:
        match event:
            case Up(peer=peer):
                if peer == self._served:
                    self._dialogue.reconnected()
                else:
                    self._dialogue.reborn()
                    self._prepared.clear()
                self._served = peer
                self._next_announcement = 0.0
            case Received(message=Reset(number=number) as reset):
                if self._dialogue.accepts_reset(number):
                    self._tell_followers(reset)
                    self._answers.clear()
                    self._preparer.reset()
                    self._runner.reset()
            case Received(message=Prepare() as message):
                self._tell_followers(message)
                self._preparer.prepare(message)
            case Received(message=Keep(numbers=numbers) as message):
                self._tell_followers(message)
                self._preparer.keep(unpack_int64(numbers))
                self._answers = {n: a for n, a in self._answers.items() if self._preparer.makes(n)}
            case Received(message=StepPlan(number=number) as plan):
                if self._dialogue.accepts_plan(number):
                    self._tell_followers(plan)
                    self._runner.launch(plan, self._preparer.take(plan.admit))
                    self.counts.launched()

    def _rank_prepared(self, rank: int, prepared: Prepared) -> None:
        """Tells the scheduler once all ranks have the matcher."""
        if not self._preparer.makes(prepared.number):
            return  # not needed any more
        answers = self._answers.setdefault(prepared.number, {})
        answers[rank] = prepared.failed
        if len(answers) > self._num_followers:
            del self._answers[prepared.number]
            self._prepared.append(Prepared(prepared.number, any(answers.values())))

    def _on_follower(self, event: Event[FollowerToLeader]) -> None:
        match event:
            case Up(peer=peer):
                self._followers.add(peer)
                if self._port is not None:
                    self._tell(peer, Rendezvous(self._port))
            case Received(peer=peer, message=prepared):
                self._rank_prepared(peer.index, prepared)
            case Down(peer=peer):
                raise GroupBroken(f"{peer} is gone, and with it this tensor-parallel group")

    def _tell_followers(self, message: Message) -> None:
        for follower in self._followers:
            self._tell(follower, message)

    def _tell(self, follower: Peer, message: Message) -> None:
        if self._workers is None or not self._workers.send(follower, [message]):
            raise GroupBroken(f"{follower} cannot be reached, and without it no step can be run")


class Follower:
    """Any other rank: runs the plans that rank 0 runs. Its results equal rank 0's, and are
    not sent."""

    def __init__(self, service: Service, runner: Runner, preparer: Preparer) -> None:
        self.counts = Counts(runner)
        self._service = service
        self._runner = runner
        self._preparer = preparer
        self._prepared: list[Prepared] = []  # to be sent
        self._leader = service.connect(
            service.settings.workers_endpoint(service.me.engine),
            list[LeaderToFollower],
            self._on_leader,
        )

    def take_reports(self) -> None:
        for report in self._runner.reports():
            match report:
                case StepResult():
                    self.counts.finished(report)
                case Progress():
                    self._service.loading(*report)
                case Loaded():
                    self._service.ready(report.detail)

    def take_prepared(self) -> None:
        self._prepared += self._preparer.reports()

    def step(self, now: float) -> float | None:
        """Tells rank 0 which matchers are ready."""
        if not self._prepared:
            return None
        if not self._leader.send(self._prepared):
            return RETRY_S
        self._prepared.clear()
        return None

    def _on_leader(self, event: Event[LeaderToFollower]) -> None:
        match event:
            case Down(peer=peer):
                raise GroupBroken(f"{peer} is gone, and with it this tensor-parallel group")
            case Received(message=Rendezvous(port=port)):
                self._runner.join(port)
            case Received(message=Reset()):
                self._preparer.reset()
                self._runner.reset()
            case Received(message=Prepare() as message):
                self._preparer.prepare(message)
            case Received(message=Keep(numbers=numbers)):
                self._preparer.keep(unpack_int64(numbers))
            case Received(message=StepPlan() as plan):
                self._runner.launch(plan, self._preparer.take(plan.admit))
                self.counts.launched()
