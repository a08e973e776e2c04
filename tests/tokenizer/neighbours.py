"""One real service process, with the test as its neighbours."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import zmq

from nanovllm.messages import Message
from nanovllm.transport.links import BoundLink, Down, Event, Peer, Received, Up, new_incarnation

TIMEOUT_S = 30


class Neighbour:
    """A binding side that the test plays.

    Attributes:
        peer: the service, when it has said hello.
        received: all messages so far.
    """

    def __init__(
        self, endpoint: str, role: str, inbound: type[list[Any]], incarnation: int | None = None
    ) -> None:
        self.incarnation = incarnation or new_incarnation()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        me = Peer(role, 0, self.incarnation)
        self._link: BoundLink[Any] = BoundLink(self._context, endpoint, me, inbound)
        self.peer: Peer | None = None
        self.received: list[Any] = []

    def wait(self, done: Callable[[], bool]) -> None:
        """Receives until `done()`; fails when that takes too long."""
        poller = zmq.Poller()
        for socket in self._link.sockets:
            poller.register(socket, zmq.POLLIN)
        deadline = time.monotonic() + TIMEOUT_S
        while not done():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError(f"waited in vain; received so far: {self.received}")
            poller.poll(int(remaining * 1000))
            for event in self._link.receive():
                self._on(event)

    def connected(self) -> Neighbour:
        self.wait(lambda: self.peer is not None)
        return self

    def expect(self, count: int) -> list[Any]:
        """The next `count` messages."""
        self.wait(lambda: len(self.received) >= count)
        taken, self.received = self.received[:count], self.received[count:]
        return taken

    def send(self, *messages: Message) -> None:
        assert self.peer is not None
        assert self._link.send(self.peer, messages)

    def close(self) -> None:
        self._link.close()
        self._context.term()

    def _on(self, event: Event[Any]) -> None:
        if isinstance(event, Up):
            self.peer = event.peer
        elif isinstance(event, Down):
            self.peer = None
        elif isinstance(event, Received):
            self.received.append(event.message)


class Neighbourhood:
    """A service process and the endpoints that it connects to."""

    def __init__(self, role: str, model: Path, arguments: Sequence[str]) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="nv-"))
        self._neighbours: list[Neighbour] = []
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", f"nanovllm.services.{role}"),
                *("--model", str(model), "--runtime-dir", str(self._directory)),
                *arguments,
            ]
        )

    def ingress(self, inbound: type[list[Any]], incarnation: int | None = None) -> Neighbour:
        return self._neighbour("services", "ingress", inbound, incarnation)

    def scheduler(self, inbound: type[list[Any]], incarnation: int | None = None) -> Neighbour:
        return self._neighbour("scheduler", "scheduler", inbound, incarnation)

    def close(self) -> None:
        for neighbour in list(self._neighbours):
            self.end(neighbour)
        self.process.terminate()
        self.process.wait(TIMEOUT_S)
        shutil.rmtree(self._directory)

    def end(self, neighbour: Neighbour) -> None:
        """Closes this neighbour's sockets, as its death does."""
        self._neighbours.remove(neighbour)
        neighbour.close()

    def _neighbour(
        self, name: str, role: str, inbound: type[list[Any]], incarnation: int | None
    ) -> Neighbour:
        endpoint = f"ipc://{self._directory}/{name}.sock"
        self._neighbours.append(Neighbour(endpoint, role, inbound, incarnation))
        return self._neighbours[-1]


@contextlib.contextmanager
def started(role: str, model: Path, *arguments: str) -> Iterator[Neighbourhood]:
    """Starts `nanovllm.services.{role}`; ends it and its neighbours with the block."""
    neighbourhood = Neighbourhood(role, model, arguments)
    try:
        yield neighbourhood
    finally:
        neighbourhood.close()


def imported_modules(module: str) -> set[str]:
    """The modules that are there in a fresh interpreter that has imported `module`."""
    program = f"import sys, {module}; print(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stdout.split())
