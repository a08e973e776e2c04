"""When to start, end and give up services: supervision as in Erlang/OTP.

No processes, sockets or clock: the supervisor tells each group what happened to its services, tells
the policy of commands, and does what is `due`. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Final

from nanovllm.launch.groups import GRACE_S, Action, Answer, Group, Phase
from nanovllm.names import ServiceId
from nanovllm.transport.links import Peer

# After a longer pause between two calls of `due`, the supervisor itself was stopped: the silence of
# that time does not count.
LONGEST_PAUSE_S: Final = 3.0


@dataclass
class _Command:
    """A command in hand: the groups of `restart` are restarted one after the other, each once all
    of `awaits` are settled."""

    asked_by: Peer
    restart: deque[Group]
    awaits: list[Group]


class Policy:
    """All groups of a pipeline, and the commands that are not done.

    Args:
        groups: the services of each group.
        now: the time.
        grace_s: of a role, the seconds between SIGTERM and SIGKILL.
    """

    def __init__(
        self,
        groups: Iterable[Sequence[ServiceId]],
        now: float,
        grace_s: Callable[[str], float] = lambda role: GRACE_S,
    ) -> None:
        self._grace_s = grace_s
        self.groups = [self._group(services, now) for services in groups]
        self._commands: deque[_Command] = deque()
        self._called_at = now

    # Commands -----------------------------------------------------------------------------------

    def restart(self, role: str, asked_by: Peer) -> None:
        """Restarts the groups of a role, or `all`, one after the other."""
        groups = [g for g in self.groups if role in ("all", g.services[0].role)]
        self._commands.append(_Command(asked_by, deque(groups), []))

    def scale(self, role: str, count: int, asked_by: Peer, now: float) -> None:
        """Starts or ends services until `count` run; each service of the role is a group."""
        groups = [
            group
            for group in self.groups
            if group.services[0].role == role and group.phase is not Phase.GONE
        ]
        for group in groups:
            if group.services[0].index >= count:
                group.stop(now, leave=True)
            else:
                group.stay()
        there = {group.services[0].index for group in groups}
        added = [self._group([ServiceId(role, i)], now) for i in range(count) if i not in there]
        self.groups += added
        self._commands.append(_Command(asked_by, deque(), groups + added))

    # What there is to do --------------------------------------------------------------------------

    def due(self, now: float, connected: Set[ServiceId] = frozenset()) -> list[Action]:
        """What to do now, in order. A silent service among `connected` may be busy, not hung."""
        pause, self._called_at = now - self._called_at, now
        if pause > LONGEST_PAUSE_S:
            for group in self.groups:
                group.forgive(pause)
        actions = self._due_for_commands(now)
        for group in self.groups:
            actions += group.due(now, connected)
        self.groups = [group for group in self.groups if group.phase is not Phase.GONE]
        return actions

    def wait_s(self, now: float) -> float:
        """The seconds until `due` must be called again."""
        deadlines = [g.deadline for g in self.groups if g.deadline is not None]
        return max(0.0, min([*deadlines, now + 1.0]) - now)

    @property
    def all_ready(self) -> bool:
        return all(group.settled for group in self.groups)

    @property
    def gives_up(self) -> bool:
        return any(group.given_up for group in self.groups)

    def group_of(self, service: ServiceId) -> Group | None:
        """The group of a service; None if the service has left."""
        return next((group for group in self.groups if service in group.services), None)

    def _group(self, services: Sequence[ServiceId], now: float) -> Group:
        return Group(services, now, self._grace_s(services[0].role))

    def _due_for_commands(self, now: float) -> list[Action]:
        answers: list[Action] = []
        while self._commands:
            command = self._commands[0]
            if not all(group.settled for group in command.awaits):
                break
            if command.restart:
                group = command.restart.popleft()
                group.stop(now)
                command.awaits = [group]
            else:
                answers.append(Answer(command.asked_by))
                self._commands.popleft()
        return answers
