"""Services that a test plays, on real links, around the processes of a service under test."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import zmq

from nanovllm.messages import Message
from nanovllm.options import settings_argv
from nanovllm.settings import Settings
from nanovllm.transport.links import (
    BoundLink,
    ConnectedLink,
    Down,
    Event,
    Link,
    Peer,
    Received,
    Up,
    new_incarnation,
)
from tests.bpe import write_checkpoint_files

TIMEOUT_S = 60.0
LONGEST_POLL_S = 0.1
T = TypeVar("T")


class Player(Protocol):
    """What is played in a neighbourhood: it takes in what comes by its sockets."""

    @property
    def sockets(self) -> tuple[Any, ...]: ...

    def take_in(self) -> None: ...


class FakePeer:
    """A service that the test plays, on its side of one link. `Neighbourhood` makes them.

    Attributes:
        me: who it is now.
        events: what has come and was not expected yet, in order.
        answer: what it says at once to an event or a message, if it is set.
    """

    def __init__(
        self,
        here: Neighbourhood,
        kind: type[BoundLink[Any]] | type[ConnectedLink[Any]],
        role: str,
        endpoint: str,
        inbound: type[list[Any]],
        incarnation: int | None,
    ) -> None:
        self.me = Peer(role, 0, incarnation or new_incarnation())
        self.events: list[Event[Any]] = []
        self.answer: Callable[[Any], Message | None] | None = None
        self._here = here
        self._make_link: Callable[[Peer], Link] = lambda me: kind(
            here.context, endpoint, me, inbound
        )
        self.link = self._make_link(self.me)
        here.players.append(self)

    def leave(self) -> None:
        """Breaks the link."""
        self._here.players.remove(self)
        self.link.close()

    def come_back(self, *, reborn: bool) -> None:
        """Makes the link anew, perhaps as another incarnation; what came before is forgotten."""
        if self in self._here.players:
            self.leave()
        if reborn:
            self.me = Peer(self.me.role, 0, new_incarnation())
        self.events.clear()
        self.link = self._make_link(self.me)
        self._here.players.append(self)

    def __str__(self) -> str:
        return f"{self.me}: {self.events[-10:]}"

    @property
    def sockets(self) -> tuple[Any, ...]:
        return self.link.sockets

    @property
    def others(self) -> list[Peer]:
        """Who is at the other side."""
        if isinstance(self.link, BoundLink):
            return self.link.peers
        return [self.link.peer] if self.link.peer else []

    def send(self, *messages: Message) -> None:
        """Sends the messages in one frame to the only peer at the other side, once it is there."""
        (peer,) = self._here.wait(f"peer of the {self.me}", lambda: self.others or None)
        if isinstance(self.link, BoundLink):
            assert self.link.send(peer, messages)
        else:
            assert self.link.send(messages)

    def expect(
        self, kind: type[T], matches: Callable[[T], bool] = lambda _: True, *, index: int = 0
    ) -> T:
        """The first Up, Down or message of this kind that matches, from the service with `index`;
        what came before it stays.

        Raises:
            ConnectionError: the service went, and a message was expected.
        """

        def found() -> T | None:
            up = True
            for number, event in enumerate(self.events):
                if event.peer.index != index:
                    continue
                what = _content(event)
                if isinstance(what, kind) and matches(what):
                    del self.events[number]
                    return what
                up = isinstance(event, Up) or (up and not isinstance(event, Down))
            if not up and kind not in (Up, Down):
                raise ConnectionError(f"no {kind.__name__} for the {self.me}: {self._here}")
            return None

        return self._here.wait(f"{kind.__name__} for the {self.me}", found)

    def all(self, kind: type[T]) -> list[T]:
        """The messages of this kind that have come and were not expected yet."""
        messages = (event.message for event in self.events if isinstance(event, Received))
        return [message for message in messages if isinstance(message, kind)]

    def take_in(self) -> None:
        for event in self.link.receive():
            self.events.append(event)
            answer = self.answer and self.answer(_content(event))
            if answer is not None:
                self.send(answer)


def _content(event: Event[Any]) -> Any:
    return event.message if isinstance(event, Received) else event


def imported_modules(module: str) -> set[str]:
    """The modules that are there in a fresh interpreter that has imported `module`."""
    program = f"import sys, {module}; print(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stdout.split())


class Neighbourhood:
    """Processes of services under test, and the peers that the test plays around them.

    Args:
        settings: of the processes. Their runtime directory is a new one, and unless `model` is
            given, so is their checkpoint, which has no weights.
    """

    def __init__(self, **settings: Any) -> None:
        self.runtime_dir = Path(tempfile.mkdtemp(prefix="nv-"))
        if "model" not in settings:
            settings["model"] = str(write_checkpoint_files(self.runtime_dir / "tiny-model"))
        self.settings = Settings(runtime_dir=str(self.runtime_dir), **settings)
        self.players: list[Player] = []
        self.context: zmq.Context[Any] = zmq.Context()
        self._processes: dict[subprocess.Popen[bytes], Path] = {}

    def binds(
        self, role: str, endpoint: str, inbound: type[list[Any]], incarnation: int | None = None
    ) -> FakePeer:
        """A peer that binds `endpoint`."""
        return FakePeer(self, BoundLink, role, endpoint, inbound, incarnation)

    def connects(
        self, role: str, endpoint: str, inbound: type[list[Any]], incarnation: int | None = None
    ) -> FakePeer:
        """A peer that connects to `endpoint`."""
        return FakePeer(self, ConnectedLink, role, endpoint, inbound, incarnation)

    def start(self, role: str, index: int = 0) -> subprocess.Popen[bytes]:
        """A process under test."""
        log = self.runtime_dir / f"{role}-{index}-{len(self._processes)}.log"
        command = [sys.executable, "-m", f"nanovllm.services.{role}", "--index", str(index)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, *settings_argv(self.settings)],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._processes[process] = log
        return process

    def ended(self, process: subprocess.Popen[bytes]) -> tuple[int, str]:
        """Waits for the end of a process: its exit code, and what it wrote."""
        return process.wait(TIMEOUT_S), self._processes[process].read_text()

    def wait(self, what: str, found: Callable[[], T | None]) -> T:
        """Plays all parts until `found` finds something. Raises TimeoutError."""
        deadline = time.monotonic() + TIMEOUT_S
        while (result := found()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no {what}: {self}")
            # `found` may have parts say more, so it is asked at least so often.
            self.play(min(left, LONGEST_POLL_S))
        return result

    def play(self, timeout_s: float) -> None:
        """All take in what has come, if something comes in time."""
        poller = zmq.Poller()
        for player in self.players:
            for socket in player.sockets:
                poller.register(socket, zmq.POLLIN)
        poller.poll(int(timeout_s * 1000) + 1)
        for player in self.players:
            player.take_in()

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for player in list(self.players):
            if isinstance(player, FakePeer):
                player.leave()
        self.context.term()
        shutil.rmtree(self.runtime_dir)

    def __str__(self) -> str:
        """What has come, and the processes' last words."""
        logs = [log.read_text()[-4000:] for log in self._processes.values()]
        return "\n".join([*map(str, self.players), *logs])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
