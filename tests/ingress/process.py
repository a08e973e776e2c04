"""A real ingress process, and a test in the place of everything around it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from nanovllm.messages import (
    End,
    EngineState,
    IngressToScheduler,
    IngressToTokenizer,
    Submit,
    Tokenize,
    Tokenized,
    pack,
)
from nanovllm.protocol import Error, Finish, Pong, ServerMessage
from nanovllm.settings import Settings
from nanovllm.transport.links import ConnectedLink, Down, Peer, Received, Up, new_incarnation
from nanovllm.transport.router_monitor import readable
from tests.ingress.harness import PROMPT, READY

TIMEOUT_S = 20.0
CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 1000,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "head_dim": 8,
}
_server_messages = msgspec.msgpack.Decoder(list[ServerMessage])


class Client:
    """A client; the options are those of its socket."""

    def __init__(self, context: zmq.Context[Any], endpoint: str, **options: int) -> None:
        self.socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        for name, value in options.items():
            self.socket.setsockopt(getattr(zmq, name), value)
        self.socket.connect(endpoint)
        self.heard: list[ServerMessage] = []
        self.frames = 0

    def say(self, *messages: Any) -> None:
        for message in messages:
            self.socket.send(msgspec.msgpack.encode(message))

    def generate(self, request_id: str, **keys: Any) -> None:
        self.say({"type": "generate", "id": request_id, "prompt": "x", **keys})

    def ping(self, around: Surroundings, unread: Client | None = None) -> Pong:
        """A ping and its answer."""
        before = len(self.of(Pong))
        self.say({"type": "ping"})
        around.wait(lambda: len(self.of(Pong)) > before, unread=unread)
        pong: Pong = self.of(Pong)[-1]
        return pong

    def read(self) -> None:
        while readable(self.socket):
            self.read_one()

    def read_one(self) -> None:
        """Waits for the next frame, if need be."""
        self.heard += _server_messages.decode(self.socket.recv())
        self.frames += 1

    def of(self, *kinds: type) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kinds)]

    def errors(self) -> list[tuple[str | None, str]]:
        return [(error.id, error.code) for error in self.of(Error)]

    def close(self) -> None:
        self.socket.close(linger=0)


class Surroundings:
    """Starts an ingress, and is its scheduler, tokenizer, detokenizer and clients.

    Attributes:
        tokenizes: what the tokenizer was sent, in order.
        submits: what the scheduler was given, in order.
        ended: the uids of the requests that were taken back from the scheduler.
    """

    def __init__(self, *arguments: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="nv-"))
        model = self.directory / "tiny-model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(CONFIG))
        self.settings = Settings(model=str(model), runtime_dir=str(self.directory))
        self.endpoint = self.settings.in_runtime_dir("ingress")
        self.arguments = ["--runtime-dir", str(self.directory), "--ingress", "", *arguments]
        self.arguments += ["--model", str(model)]
        self.context: zmq.Context[Any] = zmq.Context()
        self.clients: list[Client] = []
        self.tokenizes: list[Tokenize] = []
        self.submits: list[Submit] = []
        self.ended: list[int] = []
        self.scheduler = self.start_scheduler()
        self.tokenizer = self._connect("tokenizer", list[IngressToTokenizer])
        self.detokenizer = self._connect("detokenizer", list[None])
        self.process = self.start_ingress()

    def start_ingress(self) -> subprocess.Popen[bytes]:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nanovllm.services.ingress", *self.arguments]
        )
        self.wait(self.is_up)
        return self.process

    def is_up(self) -> bool:
        return all(link.peer is not None for link in self.links)

    @property
    def links(self) -> tuple[ConnectedLink[Any], ...]:
        return self.scheduler, self.tokenizer, self.detokenizer

    def start_scheduler(self) -> ConnectedLink[IngressToScheduler]:
        return self._connect("scheduler", list[IngressToScheduler])

    def client(self, **options: int) -> Client:
        self.clients.append(Client(self.context, self.endpoint, **options))
        return self.clients[-1]

    def wait(self, until: Callable[[], Any], *, unread: Client | None = None) -> None:
        """Plays every part (but reads nothing for `unread`) until `until` holds."""
        deadline = time.monotonic() + TIMEOUT_S
        while not until():
            if time.monotonic() > deadline:
                heard = [client.heard[-9:] for client in self.clients]
                what = f"ended {self.ended}, tokenize {self.tokenizes[-9:]}, heard {heard}"
                raise TimeoutError(what[:10_000])
            poller = zmq.Poller()
            for link in self.links:
                for socket in link.sockets:
                    poller.register(socket, zmq.POLLIN)
            reading = [c for c in self.clients if c is not unread and not c.socket.closed]
            for client in reading:
                poller.register(client.socket, zmq.POLLIN)
            poller.poll(50)
            for link in self.links:
                for event in link.receive():
                    self._take(link, event)
            for client in reading:
                client.read()

    def wait_ended(self, *requests: Submit) -> None:
        """Until they were taken back from the scheduler."""
        self.wait(lambda: {request.uid for request in requests} <= set(self.ended))

    def wait_for_end(self, client: Client) -> None:
        """Until a request of the client has got its last message."""
        self.wait(lambda: client.of(Finish, Error))

    def started(self, count: int, *, unread: Client | None = None) -> list[Submit]:
        """Waits for the tokenizer's next `count` requests, answers them, and waits until the
        scheduler is given them."""
        before = len(self.tokenizes)
        self.wait(lambda: len(self.tokenizes) >= before + count, unread=unread)
        return self.tokenized(*self.tokenizes[before:], unread=unread)

    def tokenized(self, *tokenizes: Tokenize, unread: Client | None = None) -> list[Submit]:
        """The tokenizer answers them; returns them once the scheduler is given them."""
        before = len(self.submits)
        self.answer(*tokenizes)
        self.wait(lambda: len(self.submits) >= before + len(tokenizes), unread=unread)
        return self.submits[before:]

    def answer(self, *tokenizes: Tokenize) -> None:
        assert self.tokenizer.send([Tokenized(t.uid, pack(PROMPT), t.sampling) for t in tokenizes])

    def tell_state(self, state: EngineState) -> None:
        assert self.scheduler.send([state])

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(TIMEOUT_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(TIMEOUT_S)
        for client in self.clients:
            client.close()
        for link in self.links:
            link.close()
        self.context.term()
        shutil.rmtree(self.directory)

    def _connect(self, role: str, inbound: type[list[Any]]) -> ConnectedLink[Any]:
        me = Peer(role, 0, new_incarnation())
        return ConnectedLink(self.context, self.settings.services_endpoint, me, inbound)

    def _take(self, link: ConnectedLink[Any], event: Up | Down | Received[Any]) -> None:
        if isinstance(event, Up) and link is self.scheduler:
            self.tell_state(READY)
        elif isinstance(event, Received):
            if isinstance(event.message, Tokenize):
                self.tokenizes.append(event.message)
            elif isinstance(event.message, Submit):
                self.submits.append(event.message)
            elif isinstance(event.message, End):
                self.ended.append(event.message.uid)
