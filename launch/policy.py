"""When to start, end and give up services: supervision as in Erlang/OTP.

No processes, sockets or clock: the supervisor tells each group what happened to its services, tells
the policy of commands, and does what is `due`. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from nanovllm.launch.groups import GRACE_S, Action, Answer, GiveUp, Group, Move, Phase, TakeBack
from nanovllm.names import ENGINE_ROLES, ServiceId
from nanovllm.transport.links import Peer

# After a longer pause between two calls of `due`, the supervisor itself was stopped: the silence of
# that time does not count.
LONGEST_PAUSE_S: Final = 3.0


# So long an engine that is to be stopped waits for others to take its requests.
MOVE_S: Final = 5.0


class _Step(NamedTuple):
    """Groups to stop together, or to end for good. If they are of an engine, its requests are moved
    first."""

    groups: list[Group]
    engine: int | None
    for_good: bool = False


@dataclass
class _Command:
    """A command in hand: the groups of each step are stopped once all of `awaits` are settled.

    Attributes:
        asked_by: who is to be told; None: who asked has been told already.
        added: the groups it asks for that have never been ready.
        moving: the step whose requests are being moved, and until when that may take.
    """

    asked_by: Peer | None
    steps: deque[_Step]
    awaits: list[Group]
    added: list[Group] = field(default_factory=list)
    moving: tuple[_Step, float] | None = None


class Policy:
    """All groups of a pipeline, and the commands that are not done.

    Args:
        groups: the services of each group.
        now: the time.
        grace_s: of a role, the seconds between SIGTERM and SIGKILL.
        first: the number of the first service of each role.
    """

    def __init__(
        self,
        groups: Iterable[Sequence[ServiceId]],
        now: float,
        grace_s: Callable[[str], float] = lambda role: GRACE_S,
        first: int = 0,
    ) -> None:
        self._first = first
        self._grace_s = grace_s
        self._numbers: set[int] = set()  # of all engines that there have been
        self.groups = [self._group(services, now) for services in groups]
        self._commands: deque[_Command] = deque()
        self._engines_end = 0  # the number behind the engines that `scale` was asked for last
        self._called_at = now

    # Commands -----------------------------------------------------------------------------------

    def restart(self, role: str, asked_by: Peer) -> None:
        """Restarts the groups of a role, of every `engine`, or `all`, one after the other."""
        steps: dict[ServiceId | int, _Step] = {}
        for group in self.groups:
            first = group.services[0]
            if not _is(first, role) and role != "all":
                continue
            engine = first.engine if first.role in ENGINE_ROLES else None
            name = first if engine is None else engine
            steps.setdefault(name, _Step([], engine)).groups.append(group)
        self._commands.append(_Command(asked_by, deque(steps.values()), []))

    def scale(
        self,
        role: str,
        count: int,
        services: Callable[[int], list[list[ServiceId]]],
        asked_by: Peer,
        now: float,
    ) -> None:
        """Starts or ends services, or engines, until `count` run.

        Args:
            services: of each group of the one with a number.
        """
        end = self._first + count
        if role == "engine":
            self._engines_end = end
        groups = [g for g in self.groups if _is(g.services[0], role) and g.phase is not Phase.GONE]
        leaving: dict[int, _Step] = {}
        for group in groups:
            number = group.services[0].number
            if number < end:
                group.stay()
            elif role == "engine":
                leaving.setdefault(number, _Step([], number, for_good=True)).groups.append(group)
            else:
                group.stop(now, leave=True)
        there = {group.services for group in groups}  # of an engine that ends, perhaps only one
        numbers = range(self._first, end)
        new = [group for i in numbers for group in services(i) if tuple(group) not in there]
        added = [self._group(group, now) for group in new]
        self.groups += added
        starting = [g for c in self._commands for g in c.added if g in groups]
        asked_for = added + [g for g in starting if g.services[0].number < end]
        command = _Command(asked_by, deque(leaving.values()), groups + added, asked_for)
        self._commands.append(command)

    def moved(self, engine: int) -> None:
        """The ingress has moved an engine's requests, or cannot be asked to."""
        for command in self._commands:
            if command.moving is not None and command.moving[0].engine == engine:
                command.moving = command.moving[0], 0.0

    @property
    def vacating(self) -> list[Move]:
        """What an ingress that has just started must know of the engines: those that have ended for
        good, or are about to, and the one whose requests are being moved."""
        staying = {
            group.services[0].engine
            for group in self.groups
            if group.services[0].role == "scheduler" and not group.leaves
        }
        moving = [command.moving[0] for command in self._commands if command.moving is not None]
        moves = {step.engine: self._leaves(step) for step in moving if step.engine is not None}
        moves |= dict.fromkeys(self._numbers - staying, True)
        return [Move(engine, leaves) for engine, leaves in moves.items()]

    # What there is to do --------------------------------------------------------------------------

    def due(self, now: float, connected: Set[ServiceId] = frozenset()) -> list[Action]:
        """What to do now, in order. A silent service among `connected` may be busy, not hung."""
        pause, self._called_at = now - self._called_at, now
        if pause > LONGEST_PAUSE_S:
            for group in self.groups:
                group.forgive(pause)
        actions = self._due_for_commands(now)
        for group in self.groups:
            for action in group.due(now, connected):
                actions.append(self._or_take_back(action, group, now))
        gone = [group.services[0] for group in self.groups if group.phase is Phase.GONE]
        self.groups = [group for group in self.groups if group.phase is not Phase.GONE]
        # An ingress that has started meanwhile may have met an engine in its last moments.
        engines = (service.engine for service in gone if service.role == "scheduler")
        return [*(Move(engine, leaves=True) for engine in engines), *actions]

    def wait_s(self, now: float) -> float:
        """The seconds until `due` must be called again."""
        deadlines = [g.deadline for g in self.groups if g.deadline is not None]
        return max(0.0, min([*deadlines, now + 1.0]) - now)

    @property
    def all_ready(self) -> bool:
        return all(group.settled for group in self.groups)

    def runs(self, role: str) -> bool:
        """Whether a group of this role is ready."""
        return any(group.settled and group.services[0].role == role for group in self.groups)

    @property
    def gives_up(self) -> bool:
        return any(group.given_up for group in self.groups)

    def group_of(self, service: ServiceId) -> Group | None:
        """The group of a service; None if the service has left."""
        return next((group for group in self.groups if service in group.services), None)

    def _group(self, services: Sequence[ServiceId], now: float) -> Group:
        if services[0].role == "scheduler":
            self._numbers.add(services[0].engine)
        return Group(services, now, self._grace_s(services[0].role))

    def _due_for_commands(self, now: float) -> list[Action]:
        actions: list[Action] = []
        while self._commands:
            command = self._commands[0]
            if command.moving is not None:
                step, until = command.moving
                if now < until:
                    break
                command.moving = None
                command.awaits = step.groups
                for group in step.groups:
                    group.stop(now, leave=self._leaves(step))  # called back, it starts again
            if not all(group.settled for group in command.awaits):
                break
            if not command.steps:
                if command.asked_by is not None:
                    actions.append(Answer(command.asked_by))
                self._commands.popleft()
                continue
            step = command.steps.popleft()
            if step.for_good and not self._leaves(step):
                continue
            if step.engine is None:
                command.moving = step, now
            else:
                command.moving = step, now + MOVE_S
                actions.append(Move(step.engine, self._leaves(step)))
        return actions

    def _or_take_back(self, action: Action, group: Group, now: float) -> Action:
        """A group that cannot start ends the pipeline, unless a command has added it: then its
        engine, or the group, ends alone."""
        commands = [command for command in self._commands if group in command.added]
        if not isinstance(action, GiveUp) or not commands:
            return action
        first = group.services[0]
        role = "engine" if first.role in ENGINE_ROLES else first.role
        for other in self.groups:
            if _is(other.services[0], role) and other.services[0].number == first.number:
                other.give_up(now)
        asked_by = [command.asked_by for command in commands if command.asked_by is not None]
        for command in commands:
            command.asked_by = None
        return TakeBack(action.service, action.times, asked_by)

    def _leaves(self, step: _Step) -> bool:
        """Whether the engine is to end for good: no later command has called it back."""
        return step.for_good and step.engine is not None and step.engine >= self._engines_end


def _is(service: ServiceId, role: str) -> bool:
    return service.role == role or (role == "engine" and service.role in ENGINE_ROLES)
