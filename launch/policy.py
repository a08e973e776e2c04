"""When services are started, ended and given up, in Erlang/OTP's sense of supervision.

No processes, sockets or clock: the supervisor tells what happened and what time it is, and does
what is `due`. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence, Set
from typing import Final

from nanovllm.launch.groups import Action, Answer, Group, Phase, Place, Work
from nanovllm.transport.links import Peer

# Longer between two looks, and the supervisor itself was stopped: nobody's silence counts.
LONGEST_LOOK_S: Final = 3.0


class _Operation:
    """What a command asked for: one group after the other is restarted; all that it `awaits`
    must be settled before the next."""

    def __init__(self, asked_by: Peer, restart: Iterable[Group], awaits: Iterable[Group]) -> None:
        self.asked_by = asked_by
        self.restart = deque(restart)
        self.awaits = list(awaits)


class Policy:
    """All groups of a pipeline, and the commands in hand."""

    def __init__(self, groups: Iterable[Sequence[Place]], now: float) -> None:
        self.groups = [Group(places, now) for places in groups]
        self._operations: deque[_Operation] = deque()
        self._looked_at = now

    # What happens -------------------------------------------------------------------------------

    def ended(self, place: Place, code: int, now: float) -> None:
        """A process has ended; `code` is its exit code, or minus the signal that killed it."""
        if (group := self.group_of(place)) is not None:
            group.ended(place, code, now)

    def ready(self, place: Place, now: float) -> None:
        if (group := self.group_of(place)) is not None:
            group.ready(place, now)

    def sign(self, place: Place, now: float) -> None:
        if (group := self.group_of(place)) is not None:
            group.sign(place, now)

    def work(self, place: Place, work: Work | None, now: float) -> None:
        if (group := self.group_of(place)) is not None:
            group.work(place, work, now)

    # Commands -----------------------------------------------------------------------------------

    def restart(self, role: str, asked_by: Peer) -> None:
        """Restarts the groups of a role, or `all`, one after the other."""
        groups = [g for g in self.groups if role in ("all", g.places[0].role)]
        self._operations.append(_Operation(asked_by, groups, ()))

    def scale(self, role: str, count: int, asked_by: Peer, now: float) -> None:
        """Brings the services of a role that are groups of one to `count`."""
        groups = {g.places[0].index: g for g in self.groups if g.places[0].role == role}
        added = [Group([Place(role, i)], now) for i in range(count) if i not in groups]
        leaving = [group for index, group in groups.items() if index >= count]
        for group in leaving:
            group.stop(now, leave=True)
        self.groups += added
        self._operations.append(_Operation(asked_by, (), [*added, *leaving]))

    # What there is to do --------------------------------------------------------------------------

    def due(self, now: float, answering: Set[Place] = frozenset()) -> list[Action]:
        """What is to be done now, in order. Those that are `answering` are busy, if they say
        nothing, and not hung."""
        away, self._looked_at = now - self._looked_at, now
        if away > LONGEST_LOOK_S:
            for group in self.groups:
                group.forgive(away)
        actions = self._due_for_commands(now)
        for group in self.groups:
            actions += group.due(now, answering)
        self.groups = [group for group in self.groups if group.phase is not Phase.GONE]
        return actions

    def wait_s(self, now: float) -> float:
        """In how many seconds to ask again at the latest."""
        deadlines = [g.deadline for g in self.groups if g.deadline is not None]
        return max(0.0, min([*deadlines, now + 1.0]) - now)

    @property
    def all_ready(self) -> bool:
        return all(group.settled for group in self.groups)

    @property
    def gives_up(self) -> bool:
        return any(group.given_up for group in self.groups)

    def group_of(self, place: Place) -> Group | None:
        return next((group for group in self.groups if place in group.places), None)

    def _due_for_commands(self, now: float) -> list[Action]:
        answers: list[Action] = []
        while self._operations:
            operation = self._operations[0]
            if not all(group.settled for group in operation.awaits):
                break
            if operation.restart:
                group = operation.restart.popleft()
                group.stop(now)
                operation.awaits = [group]
            else:
                answers.append(Answer(operation.asked_by))
                self._operations.popleft()
        return answers
