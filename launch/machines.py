"""The machines that have joined a pipeline, as its supervisor knows them."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import msgspec
import zmq

from nanovllm import __version__
from nanovllm.control import (
    Crashed,
    Done,
    Drain,
    Drained,
    Forget,
    Join,
    Joined,
    KillService,
    Left,
    NotJoined,
    Over,
    Restart,
    Scale,
    Services,
    ServiceStatus,
    Status,
    StatusRequest,
    ToMachine,
    ToPipeline,
    Vacate,
    Vacated,
)
from nanovllm.keys import PipelineKeys
from nanovllm.names import first_of
from nanovllm.transport.curve import Gate
from nanovllm.transport.links import BoundLink, Down, Peer, Received, new_incarnation

log = logging.getLogger(__name__)

# So long the end of the pipeline waits for machines to hear of it.
FAREWELL_S: Final = 2.0
# A machine that cannot be reached for so long is gone for good.
FORGOTTEN_S: Final = 600.0


@dataclass
class _Machine:
    """A machine that has joined.

    Attributes:
        host: what it is called by itself.
        name: the same, and its number if others are called so.
        peer: its supervisor; None while that cannot be reached.
        lost_at: when it could be reached last, if it cannot.
    """

    host: str
    name: str
    number: int
    peer: Peer | None = None
    lost_at: float = math.inf
    services: list[ServiceStatus] = field(default_factory=list)
    leaving: list[int] = field(default_factory=list)
    drained: bool = False

    @property
    def statuses(self) -> list[ServiceStatus]:
        change: dict[str, Any] = {"machine": self.name}
        if self.peer is None:  # what it had in hand is given to others
            change |= {"state": "unreachable", "stats": None}
        return [msgspec.structs.replace(service, **change) for service in self.services]


class _Command(NamedTuple):
    """What machines do one after the other, the first of those `left` now."""

    asked_by: Peer
    command: Restart | Scale
    left: deque[_Machine]


class Said(NamedTuple):
    """What a machine says that concerns the services of others."""

    by: Peer
    message: Crashed | Vacate | StatusRequest


class Machines:
    """Lets machines join, and knows their services.

    Args:
        endpoint: where they connect.
        offer: what a machine is told that joins, but for its number.
        keys: of the services; None: whoever reaches the endpoint may join.

    Raises:
        EndpointTaken, EndpointUnusable: the endpoint cannot be bound.
    """

    def __init__(self, endpoint: str, offer: Joined, keys: PipelineKeys | None) -> None:
        self._offer = offer
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        me = Peer("supervisor", 0, new_incarnation())
        self._gate = Gate(self._context, keys.trusted) if keys is not None else None
        curve = None if keys is None else keys.services
        self._link = BoundLink(self._context, endpoint, me, list[ToPipeline], curve)
        self._machines: dict[int, _Machine] = {}
        self._commands: deque[_Command] = deque()
        self._answers: list[tuple[Peer, str | None]] = []
        self._drains = False

    @property
    def sockets(self) -> tuple[Any, ...]:
        return self._link.sockets

    @property
    def statuses(self) -> list[ServiceStatus]:
        return [status for machine in self._machines.values() for status in machine.statuses]

    @property
    def drained(self) -> bool:
        """Whether no machine that is connected has a request in an HTTP server."""
        return all(m.drained for m in self._machines.values() if m.peer is not None)

    @property
    def leaving(self) -> list[Vacate]:
        """What a new ingress is to be told: the engines that are being stopped for good."""
        machines = self._machines.values()
        return [Vacate(engine, leaves=True) for m in machines for engine in m.leaving]

    def receive(self) -> Iterator[Said]:
        for event in self._link.receive():
            peer = event.peer
            machine = next((m for m in self._machines.values() if m.peer == peer), None)
            if isinstance(event, Received):
                if isinstance(event.message, Join):
                    self._join(peer, event.message)
                elif machine is not None:
                    yield from self._said(peer, machine, event.message)
            elif isinstance(event, Down) and machine is not None:
                log.warning("%s cannot be reached", machine.name)
                machine.peer, machine.lost_at = None, time.monotonic()
                self._done(machine, f"{machine.name} cannot be reached")

    def forget(self, now: float) -> list[Forget]:
        """Forgets the machines that have not been reached for `FORGOTTEN_S`; one that comes back
        after all joins as a new one. Returns what the ingress is to be told."""
        gone = [m for m in self._machines.values() if now - m.lost_at >= FORGOTTEN_S]
        for machine in gone:
            log.warning("%s is forgotten: it cannot be reached for so long", machine.name)
            del self._machines[machine.number]
        return [
            Forget(service.engine)
            for machine in gone
            for service in machine.services
            if service.role == "scheduler"
        ]

    def drain(self) -> None:
        """HTTP servers take no new requests."""
        self._drains = True
        self._tell_all(Drain(0.0))

    def vacated(self, engine: int) -> None:
        """The ingress has moved an engine's requests."""
        for machine in self._machines.values():
            if machine.peer is not None and engine // first_of(1) == machine.number:
                self._link.send(machine.peer, [Vacated(engine)])

    def tell(self, peer: Peer, status: Status) -> None:
        self._link.send(peer, [status])

    def kill(self, command: KillService) -> None:
        """Passes this on to the machine of the service."""
        machine = self._machines.get(command.service.machine)
        if machine is not None and machine.peer is not None:
            self._link.send(machine.peer, [command])

    def command(self, asked_by: Peer, command: Restart | Scale) -> None:
        """Has all machines, or the one that is named, do this; `answers` has the end."""
        if isinstance(command, Scale):
            machines = [m for m in self._machines.values() if m.name == command.machine]
            if not machines:
                names = ", ".join(m.name for m in self._machines.values())
                error = f"there is no machine {command.machine!r}; joined: {names or 'none'}"
                self._answers.append((asked_by, error))
                return
        else:
            machines = [m for m in self._machines.values() if m.peer is not None]
        self._commands.append(_Command(asked_by, command, deque(machines)))
        if len(self._commands) == 1:
            self._go_on()

    def answers(self) -> list[tuple[Peer, str | None]]:
        """Who has asked for the commands that are done since the last call, and what went wrong."""
        answers, self._answers = self._answers, []
        return answers

    def close(self) -> None:
        """Tells the machines that the pipeline is over, and waits until they have heard it."""
        self._tell_all(Over())
        deadline = time.monotonic() + FAREWELL_S
        while any(machine.peer for machine in self._machines.values()):
            if (left_s := deadline - time.monotonic()) <= 0:
                break
            zmq.zmq_poll([(socket, zmq.POLLIN) for socket in self.sockets], int(left_s * 1000) + 1)
            for _ in self.receive():
                pass  # what it says does not count any more
        self._link.close()
        if self._gate is not None:
            self._gate.close()
        self._context.term()

    def _tell_all(self, message: ToMachine) -> None:
        for machine in self._machines.values():
            if machine.peer is not None:
                self._link.send(machine.peer, [message])

    def _join(self, peer: Peer, join: Join) -> None:
        if join.version != __version__:
            why = f"it has nanovllm {join.version}, and the pipeline {__version__}: install that"
            log.warning("a machine has not joined: %s", why)
            self._link.send(peer, [NotJoined(why)])
            return
        machine = self._known(join) or self._new(join)
        machine.peer, machine.lost_at = peer, math.inf
        machine.drained = False
        log.info("%s has joined, as machine %d", machine.name, machine.number)
        self._link.send(peer, [msgspec.structs.replace(self._offer, number=machine.number)])
        if self._drains:
            self._link.send(peer, [Drain(0.0)])

    def _known(self, join: Join) -> _Machine | None:
        """The machine that is back; one whose supervisor has died is so under another."""
        for machine in self._machines.values():
            is_it = join.number == machine.number if join.number else join.machine == machine.host
            if is_it and machine.peer is None:
                return machine
        return None

    def _new(self, join: Join) -> _Machine:
        taken = self._machines.keys()
        free = (number for number in range(1, len(taken) + 2) if number not in taken)
        number = join.number if join.number and join.number not in taken else next(free)
        names = {machine.name for machine in self._machines.values()}
        name = join.machine if join.machine not in names else f"{join.machine}-{number}"
        machine = self._machines[number] = _Machine(join.machine, name, number)
        return machine

    def _said(self, peer: Peer, machine: _Machine, message: ToPipeline) -> Iterator[Said]:
        match message:
            case Services():
                machine.services, machine.leaving = message.services, message.leaving
            case Drained():
                machine.drained = True
            case Done():
                self._done(machine, message.error)
            case Left():
                log.info("%s has left", machine.name)
                del self._machines[machine.number]
                machine.peer = None
                self._done(machine, f"{machine.name} has left")
            case Crashed() | Vacate() | StatusRequest():
                yield Said(peer, message)

    # Commands -----------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Asks the machine whose turn it is in the first command."""
        while self._commands:
            _, command, left = self._commands[0]
            if not left:
                self._answer(None)
            elif left[0].peer is None or not self._link.send(left[0].peer, [command]):
                self._answer(f"{left[0].name} cannot be reached")
            else:
                return

    def _done(self, machine: _Machine, error: str | None) -> None:
        """The machine has done what it was asked, or cannot."""
        if not self._commands or self._commands[0].left[0] is not machine:
            return
        self._commands[0].left.popleft()
        if error is not None:
            self._answer(error)
        self._go_on()

    def _answer(self, error: str | None) -> None:
        self._answers.append((self._commands.popleft().asked_by, error))
