"""The core in memory, and what its surroundings would say to it."""

from __future__ import annotations

from typing import Any

import msgspec

from nanovllm.messages import (
    Admitted,
    Cancel,
    Delta,
    Ending,
    EngineState,
    HandedOn,
    Tokenize,
    Usage,
    pack,
)
from nanovllm.protocol import ServerMessage
from nanovllm.services.ingress.core import About, Core
from nanovllm.services.ingress.frames import Limits
from nanovllm.services.ingress.sessions import Session
from nanovllm.transport.links import Peer

INCARNATION = 0x0ABCDEF0
TOKENIZER = Peer("tokenizer", 0, 11)
DETOKENIZER = Peer("detokenizer", 0, 12)
SCHEDULER = Peer("scheduler", 0, 13)
CLIENT = b"\x00cli1"

_server_messages = msgspec.msgpack.Decoder(list[ServerMessage])


def decode(frame: bytes) -> list[ServerMessage]:
    return _server_messages.decode(frame)


class World:
    """A core whose services are up, and what it sent to whom."""

    def __init__(self, *, max_pending_requests: int = 100, services: bool = True) -> None:
        self.core = Core(
            INCARNATION,
            Limits(vocab_size=1000, max_model_len=64, max_message_bytes=1 << 20),
            max_pending_requests,
            About("0.0", "tiny"),
            draw_seed=lambda: 4242,
        )
        self.cancelled: list[int] = []
        self.disconnected: list[bytes] = []
        self.full: set[bytes] = set()
        self.now = 0.0
        self.steps = 0
        if services:
            self.core.service_up(TOKENIZER)
            self.core.service_up(DETOKENIZER)
            self.core.scheduler_up(SCHEDULER, reborn=True)
            self.core.from_scheduler(EngineState(True))

    def say(self, *messages: Any, client: bytes = CLIENT) -> None:
        for message in messages:
            self.core.receive(client, msgspec.msgpack.encode(message))
        self.work()

    def work(self) -> None:
        while self.core.has_work:
            self.core.work()

    def generate(self, request_id: str = "a", client: bytes = CLIENT, **keys: Any) -> None:
        ask = {"type": "generate", "id": request_id, "prompt": "x", **keys}
        self.say(ask, client=client)

    def tokenizes(self, peer: Peer = TOKENIZER) -> list[Tokenize]:
        """What the tokenizer is sent now; cancels go to `cancelled`."""
        messages: list[Tokenize] = []
        for who, unsent in self.core.dispatcher.unsent():
            if who == peer:
                messages += [m for m in unsent if isinstance(m, Tokenize)]
                self.cancelled += [m.uid for m in unsent if isinstance(m, Cancel)]
                unsent.clear()
        return messages

    def start(self, *ids: str, **keys: Any) -> list[Tokenize]:
        """Requests that run: each is what the tokenizer got."""
        for request_id in ids:
            self.generate(request_id, **keys)
        started = self.tokenizes()
        for tokenize in started:
            self.core.from_tokenizer(
                HandedOn(tokenize.uid, tokenize.attempt, 1, SCHEDULER.incarnation), now=0.0
            )
            self.core.from_scheduler(Admitted(tokenize.uid, tokenize.attempt))
        return started

    def sent(self, client: bytes = CLIENT) -> list[bytes]:
        """The frames that the client gets now; none while it is in `full`."""
        sent: list[bytes] = []
        for session in self._unsent(client):
            while (frame := session.outgoing()) is not None and client not in self.full:
                sent.append(frame)
                self.core.sent(session)
            if client not in self.full:
                self.core.unsent.discard(session)
            elif frame is not None and self.core.full(session, self.now):
                self.disconnected.append(client)
        return sent

    def heard(self, client: bytes = CLIENT) -> list[ServerMessage]:
        """The messages that the client gets now."""
        return [message for frame in self.sent(client) for message in decode(frame)]

    def _unsent(self, client: bytes) -> list[Session]:
        return [session for session in self.core.unsent if session.connection == client]


def delta(
    of: Tokenize, start: int, tokens: list[int], *, end: bool = False, attempt: int | None = None
) -> Delta:
    """Tokens from `start` on; each releases its last digit as text."""
    total = start + len(tokens)
    return Delta(
        uid=of.uid,
        attempt=of.attempt if attempt is None else attempt,
        token_offset=start,
        text_offset=start,
        token_ids=pack(tokens),
        text="".join(str(token % 10) for token in tokens),
        logprobs=[],
        ending=Ending("length", Usage(3, total, 2)) if end else None,
    )
