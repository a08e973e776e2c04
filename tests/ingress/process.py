"""A real ingress process, and a test in the place of everything around it."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from typing import Any

from benchmarks.support.raw_client import RawClient
from nanovllm.messages import (
    End,
    IngressToScheduler,
    IngressToTokenizer,
    Message,
    Submit,
    Tokenize,
    Tokenized,
    pack,
)
from nanovllm.protocol import Error, Pong, ServerMessage
from nanovllm.transport.links import Up
from tests.ingress.harness import PROMPT, READY
from tests.peer import TIMEOUT_S, Neighbourhood


class Client(RawClient):
    """A client of `around`; the options are those of its socket.

    Attributes:
        reads: whether it reads what it is told.
        heard: what it was told, and in how many `frames`.
    """

    def __init__(self, around: Surroundings, **options: int) -> None:
        super().__init__(around.endpoint, **options)
        self.around = around
        self.reads = True
        self.heard: list[ServerMessage] = []
        self.frames = 0
        around.players.append(self)

    def generate(self, request_id: str, **keys: Any) -> None:
        self.say({"type": "generate", "id": request_id, "prompt": "x", **keys})

    def ping(self) -> Pong:
        """A ping and its answer."""
        before = len(self.of(Pong))
        self.say({"type": "ping"})
        self.around.until(lambda: len(self.of(Pong)) > before)
        pong: Pong = self.of(Pong)[-1]
        return pong

    @property
    def sockets(self) -> tuple[Any, ...]:
        return (self.socket,) if self.reads else ()

    def take_in(self) -> None:
        while self.reads and self.read_one(0.0):
            pass

    def read_one(self, timeout_s: float = TIMEOUT_S) -> bool:
        """Reads the next frame, if one comes in time."""
        heard = self.receive(timeout_s)
        self.heard += heard
        self.frames += bool(heard)
        return bool(heard)

    def of(self, *kinds: type) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kinds)]

    def errors(self) -> list[tuple[str | None, str]]:
        return [(error.id, error.code) for error in self.of(Error)]

    def close(self) -> None:
        self.around.players.remove(self)
        super().close()

    def __str__(self) -> str:
        return f"client: {self.heard[-9:]}"


class Surroundings(Neighbourhood):
    """Starts an ingress, and is its scheduler, tokenizer, detokenizer and clients."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"ingress": "", **settings})
        self.endpoint = self.settings.in_runtime_dir("ingress")
        services = self.settings.services_endpoint
        self.scheduler = self.connects("scheduler", services, list[IngressToScheduler])
        self.scheduler.answer = _ready
        self.tokenizer = self.connects("tokenizer", services, list[IngressToTokenizer])
        self.detokenizer = self.connects("detokenizer", services, list[None])
        self.process = self.start_ingress()

    def start_ingress(self) -> subprocess.Popen[bytes]:
        self.process = self.start("ingress")
        peers = (self.scheduler, self.tokenizer, self.detokenizer)
        self.until(lambda: all(peer.others for peer in peers))
        return self.process

    @property
    def tokenizes(self) -> list[Tokenize]:
        """What the tokenizer was sent, in order."""
        return self.tokenizer.all(Tokenize)

    @property
    def submits(self) -> list[Submit]:
        """What the scheduler was given, in order."""
        return self.scheduler.all(Submit)

    @property
    def withdrawn(self) -> set[int]:
        """The uids of the requests that were taken back from the scheduler."""
        return {end.uid for end in self.scheduler.all(End)}

    def client(self, **options: int) -> Client:
        return Client(self, **options)

    def until(self, condition: Callable[[], Any]) -> None:
        """Plays every part until `condition` holds."""
        self.wait("change", lambda: condition() or None)

    def until_withdrawn(self, *requests: Submit) -> None:
        """Until they were taken back from the scheduler."""
        self.until(lambda: {request.uid for request in requests} <= self.withdrawn)

    def started(self, count: int) -> list[Submit]:
        """Waits for the tokenizer's next `count` requests, answers them, and waits until the
        scheduler is given them."""
        before = len(self.tokenizes)
        self.until(lambda: len(self.tokenizes) >= before + count)
        return self.tokenized(*self.tokenizes[before:])

    def tokenized(self, *tokenizes: Tokenize) -> list[Submit]:
        """The tokenizer answers them; returns them once the scheduler is given them."""
        before = len(self.submits)
        self.answer(*tokenizes)
        self.until(lambda: len(self.submits) >= before + len(tokenizes))
        return self.submits[before:]

    def answer(self, *tokenizes: Tokenize) -> None:
        self.tokenizer.send(*(Tokenized(t.uid, pack(PROMPT), t.sampling) for t in tokenizes))

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(TIMEOUT_S)


def _ready(event: Any) -> Message | None:
    return READY if isinstance(event, Up) else None
