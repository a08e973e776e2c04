"""Services that live and die together: when they are started again, taken for hung, or given up.

No processes, sockets or clock. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Sequence, Set
from typing import Final, NamedTuple

import msgspec

from nanovllm.control import Stats, TokenizerStats, WorkerStats
from nanovllm.service import EXIT_FOLLOWED, EXIT_MISCONFIGURED
from nanovllm.transport.links import Peer

# Back-off: the first restart is at once, later ones wait, twice as long each time.
FIRST_DELAY_S: Final = 0.1
LONGEST_DELAY_S: Final = 3.0
# After so long in good health, the back-off begins anew.
STABLE_S: Final = 5.0
# Starts in a row without becoming ready, after which a service is given up.
MAX_FAILED_STARTS: Final = 5
# Kills from outside may hit a service as often while it starts; for so long that is borne.
KILLS_BORNE_S: Final = 120.0
# A service has this long to end after SIGTERM.
GRACE_S: Final = 3.0
# Reports come once a second. A service that starts may be busy importing and reading files.
LIVENESS_S: Final = 10.0
START_LIVENESS_S: Final = 60.0
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


class Place(msgspec.Struct, frozen=True):
    """A service, through all its lives."""

    role: str
    index: int

    def __str__(self) -> str:
        return f"{self.role} {self.index}"


class Start(NamedTuple):
    place: Place


class Stop(NamedTuple):
    """SIGTERM."""

    place: Place


class Kill(NamedTuple):
    """SIGKILL. `why` is empty where another's death is the reason."""

    place: Place
    why: str


class GiveUp(NamedTuple):
    """Nothing that a restart would mend: `place` ended `times` in a row before it was ready."""

    place: Place
    times: int


class Answer(NamedTuple):
    """What a command asked for is so."""

    asked_by: Peer


class Blame(NamedTuple):
    """`place` has ended for a reason of its own."""

    place: Place


Action = Start | Stop | Kill | GiveUp | Answer | Blame


class Work(NamedTuple):
    """What a service has in hand, and how much it has done so far."""

    in_hand: int
    done: int


def work_of(stats: Stats) -> Work | None:
    """Of a service that may be stuck in its work while its loop answers; else None: the loop of
    the others is their work."""
    if isinstance(stats, TokenizerStats):
        return Work(stats.queued, stats.tokenized)
    if isinstance(stats, WorkerStats):
        return Work(stats.in_flight, stats.steps)
    return None


def by_itself(code: int) -> bool:
    """Whether a service ended for a reason of its own. SIGTERM, which makes it exit with 0, and
    SIGKILL come from outside; a rank that lost another one only followed it."""
    return (code > 0 and code != EXIT_FOLLOWED) or code in _CRASHES


class _Watch:
    """The two clocks of one life of a service."""

    def __init__(self, now: float) -> None:
        self.sign_at = now
        self.work_at = now
        self.work: Work | None = None

    def note_work(self, work: Work | None, now: float) -> None:
        if work is None or not work.in_hand or work != self.work:
            self.work_at = now
        self.work = work

    def hung(self, ready: bool, answers: bool, now: float) -> str | None:
        """Why it is to be taken for hung; None if it is not. `answers`: it may say nothing for as
        long as its work takes."""
        limit = LIVENESS_S if ready else START_LIVENESS_S
        if now - self.sign_at >= limit and not (ready and answers):
            return f"it has given no sign for {limit:g} s"
        if ready and now - self.work_at >= PROGRESS_S:
            return f"it has work in hand, and nothing was done for {PROGRESS_S:g} s"
        return None

    def forgive(self, seconds: float) -> None:
        self.sign_at += seconds
        self.work_at += seconds


class Phase(enum.Enum):
    WAITING = enum.auto()  # until `start_at`
    RUNNING = enum.auto()
    ENDING = enum.auto()
    GONE = enum.auto()  # not to come back


class Group:
    """Services that live and die together (one_for_all); most are groups of one (one_for_one).

    Attributes:
        places: its members.
        restarts: how often it was started again.
        given_up: whether it is not to be started again, and the pipeline ends.
    """

    def __init__(self, places: Sequence[Place], now: float) -> None:
        self.places = tuple(places)
        self.phase = Phase.WAITING
        self.restarts = -1
        self.given_up = False
        self._start_at = now
        self._kill_at: float | None = None
        self._leaving = False
        self._alive: set[Place] = set()
        self._not_ready = set(places)
        self._watches: dict[Place, _Watch] = {}
        self._ready_since: float | None = None
        self._ever_ready = False
        self._delays = 0
        self._failed: list[tuple[float, bool]] = []  # starts in a row: when, whether by itself
        self._actions: list[Action] = []

    @property
    def settled(self) -> bool:
        """Whether it is ready, or gone for good."""
        return self.phase is Phase.GONE or (self.phase is Phase.RUNNING and not self._not_ready)

    @property
    def deadline(self) -> float | None:
        """When `due` has something to do, hung services aside."""
        if self.phase is Phase.WAITING:
            return self._start_at
        return self._kill_at if self.phase is Phase.ENDING else None

    def due(self, now: float, answering: Set[Place]) -> list[Action]:
        if self.phase is Phase.WAITING and now >= self._start_at:
            self._start(now)
        elif self.phase is Phase.RUNNING:
            self._end_if_hung(now, answering)
        if self.phase is Phase.ENDING and self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            self._actions += [Kill(place, "") for place in self.places if place in self._alive]
        actions, self._actions = self._actions, []
        return actions

    def ended(self, place: Place, code: int, now: float) -> None:
        """The process of `place` has ended. Whoever is left of the group ends too."""
        self._alive.discard(place)
        if self.phase is Phase.RUNNING:
            self._note_death(place, code, by_itself(code), now)
            if by_itself(code):
                self._actions.append(Blame(place))
            self.phase = Phase.ENDING
            self._kill_at = now
        if not self._alive:
            self.phase = Phase.GONE if self._leaving else Phase.WAITING

    def ready(self, place: Place, now: float) -> None:
        if place not in self._alive:
            return
        self._not_ready.discard(place)
        if not self._not_ready and self._ready_since is None:
            self._ready_since = now
            self._ever_ready = True
            self._failed.clear()

    def sign(self, place: Place, now: float) -> None:
        """The service has said something."""
        if place in self._watches:
            self._watches[place].sign_at = now

    def work(self, place: Place, work: Work | None, now: float) -> None:
        """The service has reported its work."""
        if place in self._watches:
            self._watches[place].note_work(work, now)

    def stop(self, now: float, *, leave: bool = False) -> None:
        """Ends it in peace, to be started again at once, or not at all (`leave`)."""
        self._leaving = self._leaving or leave
        if self.phase is Phase.RUNNING:
            self._actions += [Stop(place) for place in self.places if place in self._alive]
            self.phase = Phase.ENDING
            self._kill_at = now + GRACE_S
            self._start_at = now
        elif self.phase is Phase.WAITING:
            self._start_at = now
            self.phase = Phase.GONE if leave else Phase.WAITING

    def forgive(self, seconds: float) -> None:
        """Nobody listened for so long: that silence does not count."""
        for watch in self._watches.values():
            watch.forgive(seconds)

    def _start(self, now: float) -> None:
        self.phase = Phase.RUNNING
        self.restarts += 1
        self._kill_at = None
        self._ready_since = None
        self._alive = set(self.places)
        self._not_ready = set(self.places)
        self._watches = {place: _Watch(now) for place in self.places}
        self._actions += map(Start, self.places)

    def _end_if_hung(self, now: float, answering: Set[Place]) -> None:
        for place, watch in self._watches.items():
            ready = place not in self._not_ready
            if (why := watch.hung(ready, place in answering, now)) is not None:
                self._note_death(place, -signal.SIGKILL, True, now)
                self.phase = Phase.ENDING
                self._actions += [
                    Kill(other, why if other == place else "")
                    for other in self.places
                    if other in self._alive
                ]
                return

    def _note_death(self, place: Place, code: int, own: bool, now: float) -> None:
        """Gives up, or sets when it is started again."""
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
                self._actions.append(GiveUp(place, len(self._failed)))
        elif now - self._ready_since >= STABLE_S:
            self._delays = 0
        delay = FIRST_DELAY_S * 2.0 ** (self._delays - 1) if self._delays else 0.0
        self._start_at = now + min(LONGEST_DELAY_S, delay)
        self._delays = min(self._delays + 1, 16)
