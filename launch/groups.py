"""A group of services that start and end together: when to restart, kill or give up the group.

No processes, sockets or clock. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

import enum
import math
import signal
from collections.abc import Sequence, Set
from typing import Final, NamedTuple

from nanovllm.control import Stats, TokenizerStats, WorkerStats
from nanovllm.exit_codes import EXIT_FOLLOWED, EXIT_MISCONFIGURED
from nanovllm.names import ServiceId
from nanovllm.transport.links import Peer

# Back-off: the first restart is at once, each later one waits twice as long as the one before.
FIRST_DELAY_S: Final = 0.1
LONGEST_DELAY_S: Final = 3.0
# A group that was ready for so long starts its back-off anew.
STABLE_S: Final = 5.0
# A group is given up when so many starts in a row ended by themselves before it was ready.
MAX_FAILED_STARTS: Final = 5
# Starts that were killed from outside count too, once the first failed start is so long ago.
KILLS_BORNE_S: Final = 120.0
# Between SIGTERM and SIGKILL. An HTTP server has as long as its streams have to end, and this.
GRACE_S: Final = 3.0
# The longest silence of a service, which reports once a second: of one that is ready, of one that
# starts, and of one that starts and is connected. While a library is loaded, torch's gigabytes
# from a cold disk above all, the interpreter stands still, and only ZeroMQ's thread answers.
LIVENESS_S: Final = 10.0
START_LIVENESS_S: Final = 60.0
CONNECTED_START_LIVENESS_S: Final = 600.0
# The longest time that work may wait without progress.
PROGRESS_S: Final = 120.0

_CRASHES: Final = {
    -number
    for number in (
        signal.SIGABRT,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGSEGV,
        signal.SIGSYS,
    )
}


class Start(NamedTuple):
    service: ServiceId


class Stop(NamedTuple):
    """Send SIGTERM."""

    service: ServiceId


class Kill(NamedTuple):
    """Send SIGKILL. `why` is empty if the service is killed because another of its group ended."""

    service: ServiceId
    why: str


class GiveUp(NamedTuple):
    """End the pipeline: `service` has ended `times` in a row before it was ready."""

    service: ServiceId
    times: int


class Move(NamedTuple):
    """Tell the ingress that an engine is about to be stopped, for good if it `leaves`."""

    engine: int
    leaves: bool


class Answer(NamedTuple):
    """Tell `asked_by` that its command is done."""

    asked_by: Peer


class Blame(NamedTuple):
    """Tell the ingress that `service` has ended by itself."""

    service: ServiceId


class TakeBack(NamedTuple):
    """Tell those who `asked_by` command for more services that `service` has ended `times` in a row
    before it was ready, and is not started again."""

    service: ServiceId
    times: int
    asked_by: list[Peer]


Action = Start | Stop | Kill | GiveUp | Move | Answer | Blame | TakeBack


class Work(NamedTuple):
    """How many items a service works on, and how many it has finished."""

    in_hand: int
    done: int


def work_of(stats: Stats) -> Work | None:
    """The work of a tokenizer or worker, which may be stuck while their loop still reports. None
    for the other roles: their loop does the work itself."""
    if isinstance(stats, TokenizerStats):
        return Work(stats.queued, stats.tokenized)
    if isinstance(stats, WorkerStats):
        return Work(stats.in_flight, stats.steps)
    return None


def by_itself(code: int) -> bool:
    """Whether a service that ended with `code` ended by itself: not by SIGTERM (exit code 0) or
    SIGKILL, and not because another rank had ended."""
    return (code > 0 and code != EXIT_FOLLOWED) or code in _CRASHES


def longest_silence_s(service: ServiceId, ready: bool, connected: bool) -> float:
    """How long `service` may be silent. The loop of a tokenizer is silent while it encodes a long
    prompt: a tokenizer whose connection stands has but the clock of its progress."""
    if ready:
        return math.inf if connected and service.role == "tokenizer" else LIVENESS_S
    return CONNECTED_START_LIVENESS_S if connected else START_LIVENESS_S


class _Watch:
    """When one incarnation of a service last gave a sign, and last made progress."""

    def __init__(self, now: float) -> None:
        self.sign_at = now
        self.progress_at = now
        self.work: Work | None = None

    def note_work(self, work: Work | None, now: float) -> None:
        if work is None or not work.in_hand or work != self.work:
            self.progress_at = now
        self.work = work

    def hung(self, ready: bool, silence_s: float, now: float) -> str | None:
        """Why the service counts as hung; None if it does not. It may be silent for `silence_s`."""
        if now - self.sign_at >= silence_s:
            return f"it has given no sign for {silence_s:g} s"
        if ready and now - self.progress_at >= PROGRESS_S:
            return f"it has work in hand, and nothing was done for {PROGRESS_S:g} s"
        return None

    def forgive(self, seconds: float) -> None:
        self.sign_at += seconds
        self.progress_at += seconds


class Phase(enum.Enum):
    WAITING = enum.auto()  # until `start_at`
    RUNNING = enum.auto()
    ENDING = enum.auto()
    GONE = enum.auto()  # for good


class Group:
    """Services that start and end together (one_for_all); most groups have one (one_for_one)."""

    def __init__(self, services: Sequence[ServiceId], now: float, grace_s: float = GRACE_S) -> None:
        self.services = tuple(services)
        self._grace_s = grace_s
        self.phase = Phase.WAITING
        self.restarts = -1  # how often the group was started again
        self.given_up = False
        self._start_at = now
        self._kill_at: float | None = None
        self._leaving = False
        self._alive: set[ServiceId] = set()
        self._not_ready = set(services)
        self._watches: dict[ServiceId, _Watch] = {}
        self._ready_since: float | None = None
        self._ever_ready = False
        self._delays = 0
        # The latest starts in a row that did not get ready: when, and whether by themselves.
        self._failed: list[tuple[float, bool]] = []
        self._actions: list[Action] = []

    @property
    def settled(self) -> bool:
        """Whether the group is ready, or gone for good."""
        return self.phase is Phase.GONE or (self.phase is Phase.RUNNING and not self._not_ready)

    @property
    def leaves(self) -> bool:
        """Whether the group ends for good."""
        return self._leaving

    @property
    def deadline(self) -> float | None:
        """When `due` next has something to do, apart from killing what hangs."""
        if self.phase is Phase.WAITING:
            return self._start_at
        return self._kill_at if self.phase is Phase.ENDING else None

    def due(self, now: float, connected: Set[ServiceId]) -> list[Action]:
        if self.phase is Phase.WAITING and now >= self._start_at:
            self._start(now)
        elif self.phase is Phase.RUNNING:
            self._end_if_hung(now, connected)
        if self.phase is Phase.ENDING and self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            self._actions += [
                Kill(service, "") for service in self.services if service in self._alive
            ]
        actions, self._actions = self._actions, []
        return actions

    def ended(self, service: ServiceId, code: int, now: float) -> None:
        """The process of `service` has ended, with exit code `code` or by the signal -`code`; the
        rest of the group is killed."""
        self._alive.discard(service)
        if self.phase is Phase.RUNNING:
            self._note_death(service, code, by_itself(code), now)
            if by_itself(code):
                self._actions.append(Blame(service))
            self.phase = Phase.ENDING
            self._kill_at = now
        if not self._alive:
            self.phase = Phase.GONE if self._leaving else Phase.WAITING

    def ready(self, service: ServiceId, now: float) -> None:
        if service not in self._alive:
            return
        self._not_ready.discard(service)
        if not self._not_ready and self._ready_since is None:
            self._ready_since = now
            self._ever_ready = True
            self._failed.clear()

    def sign(self, service: ServiceId, now: float) -> None:
        """The service has sent something."""
        if service in self._watches:
            self._watches[service].sign_at = now

    def work(self, service: ServiceId, work: Work | None, now: float) -> None:
        """The service has reported its `work`."""
        if service in self._watches:
            self._watches[service].note_work(work, now)

    def stop(self, now: float, *, leave: bool = False) -> None:
        """Ends the group by SIGTERM; it starts again at once, or never with `leave`."""
        self._leaving = self._leaving or leave
        if self.phase is Phase.RUNNING:
            self._actions += [Stop(service) for service in self.services if service in self._alive]
            self.phase = Phase.ENDING
            self._kill_at = now + self._grace_s
            self._start_at = now
        elif self.phase is Phase.WAITING:
            self._start_at = now
            self.phase = Phase.GONE if leave else Phase.WAITING

    def give_up(self, now: float) -> None:
        """Ends the group alone, and not the pipeline, if the group cannot start."""
        self.given_up = False
        self.stop(now, leave=True)

    def stay(self) -> None:
        """Takes back a `leave`: a group that has not ended yet starts again when it has."""
        self._leaving = False

    def forgive(self, seconds: float) -> None:
        """Does not count the last `seconds` as silence: the supervisor did not listen."""
        for watch in self._watches.values():
            watch.forgive(seconds)

    def _start(self, now: float) -> None:
        self.phase = Phase.RUNNING
        self.restarts += 1
        self._kill_at = None
        self._ready_since = None
        self._alive = set(self.services)
        self._not_ready = set(self.services)
        self._watches = {service: _Watch(now) for service in self.services}
        self._actions += map(Start, self.services)

    def _end_if_hung(self, now: float, connected: Set[ServiceId]) -> None:
        for service, watch in self._watches.items():
            ready = service not in self._not_ready
            silence_s = longest_silence_s(service, ready, service in connected)
            if (why := watch.hung(ready, silence_s, now)) is not None:
                self._note_death(service, -signal.SIGKILL, True, now)
                self.phase = Phase.ENDING
                self._actions += [
                    Kill(other, why if other == service else "")
                    for other in self.services
                    if other in self._alive
                ]
                return

    def _note_death(self, service: ServiceId, code: int, own: bool, now: float) -> None:
        """Gives up the group, or sets when it starts again."""
        if self._ready_since is None:
            self._failed.append((now, own))
            failures = sum(own for _, own in self._failed)
            borne = now - self._failed[0][0] < KILLS_BORNE_S
            if (
                (code == EXIT_MISCONFIGURED and not self._ever_ready)
                or failures >= MAX_FAILED_STARTS
                or (len(self._failed) >= MAX_FAILED_STARTS and not borne)
            ):
                self.given_up = True
                self._actions.append(GiveUp(service, len(self._failed)))
        elif now - self._ready_since >= STABLE_S:
            self._delays = 0
        delay = FIRST_DELAY_S * 2.0 ** (self._delays - 1) if self._delays else 0.0
        self._start_at = now + min(LONGEST_DELAY_S, delay)
        self._delays = min(self._delays + 1, 16)
