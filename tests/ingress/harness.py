"""The core in memory, and what its surroundings would say to it."""

from __future__ import annotations

from typing import Any

import msgspec

from nanovllm.messages import (
    Decoded,
    End,
    Ending,
    EngineState,
    Held,
    IngressToScheduler,
    Missing,
    Submit,
    Tokenize,
    Tokenized,
    pack,
    pack_int64,
    unpack,
    unpack_int64,
)
from nanovllm.protocol import ServerMessage, Usage
from nanovllm.services.ingress.core import About, Core
from nanovllm.services.ingress.engine import Engine
from nanovllm.services.ingress.frames import Limits
from nanovllm.services.ingress.sessions import Session
from nanovllm.tracing import Tracer
from nanovllm.transport.links import Peer

INCARNATION = 0x0ABCDEF0
TOKENIZER = Peer("tokenizer", 0, 11)
DETOKENIZER = Peer("detokenizer", 0, 12)
SCHEDULER = Peer("scheduler", 0, 13)
REBORN = Peer("scheduler", 0, 14)
CLIENT = b"\x00cli1"
OTHER = b"\x00cli2"
SESSION = "0abcdef0-1"  # the first client's
BUDGET = 50
READY = EngineState(True, slots=4, blocks=100, block_size=16)
NOT_READY = EngineState(False, slots=4, blocks=0, block_size=0)
PROMPT = [1, 2, 3]

_server_messages = msgspec.msgpack.Decoder(list[ServerMessage])


def decode(frame: bytes) -> list[ServerMessage]:
    return _server_messages.decode(frame)


class World:
    """A core whose services are up, and what the core sent to whom.

    Attributes:
        ended: uid and attempt of each `End` that the scheduler was sent.
        held: the same of the latest `Held`; None: there was none yet.
    """

    def __init__(
        self,
        *,
        max_pending_requests: int = 100,
        services: bool = True,
        tracer: Tracer | None = None,
    ) -> None:
        self.now_ns = 0
        self.core = Core(
            INCARNATION,
            Limits(vocab_size=1000, max_model_len=64, max_message_bytes=1 << 20),
            max_pending_requests,
            BUDGET,
            About("0.0", "tiny"),
            draw_seed=lambda: 4242,
            clock=lambda: self.now_ns,
            tracer=tracer,
        )
        self.ended: list[tuple[int, int]] = []
        self.held: dict[int, int] | None = None
        self.disconnected: list[bytes] = []
        self.full: set[bytes] = set()
        self.now = 0.0
        self.steps = 0
        if services:
            self.core.service_up(TOKENIZER)
            self.core.service_up(DETOKENIZER)
            self.scheduler_up(SCHEDULER)

    @property
    def engine(self) -> Engine:
        return self.core.engines.by_number[SCHEDULER.engine]

    # Clients ------------------------------------------------------------------------------------

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

    def abort(self, request_id: str) -> None:
        self.say({"type": "abort", "id": request_id})

    def sent(self, client: bytes = CLIENT) -> list[bytes]:
        """The frames that the client gets now; none while it is in `full`."""
        sent: list[bytes] = []
        for session in self._unsent(client):
            while (frame := session.outgoing()) is not None and client not in self.full:
                sent.append(frame)
                self.core.sent(session)
            if client not in self.full:
                self.core.sessions.unsent.discard(session)
            elif frame is not None and session.does_not_read(self.now):
                self.core.closed(client)
                self.disconnected.append(client)
        return sent

    def heard(self, client: bytes = CLIENT) -> list[ServerMessage]:
        """The messages that the client gets now."""
        return [message for frame in self.sent(client) for message in decode(frame)]

    def _unsent(self, client: bytes) -> list[Session]:
        return [session for session in self.core.sessions.unsent if session.connection == client]

    # Services -----------------------------------------------------------------------------------

    def tokenizes(self, peer: Peer = TOKENIZER) -> list[Tokenize]:
        """What the tokenizer is sent now."""
        messages: list[Tokenize] = []
        while frame := dict(self.core.tokenizers.frames()).get(peer):
            messages += frame
            self.core.tokenizers.sent(peer, frame)
        return messages

    def tokenized(self, *tokenizes: Tokenize, peer: Peer = TOKENIZER) -> None:
        """The tokenizer answers; a text is `PROMPT`."""
        for tokenize in tokenizes:
            prompt = tokenize.prompt_token_ids or pack(PROMPT)
            self.core.from_tokenizer(peer, Tokenized(tokenize.uid, prompt, tokenize.sampling))

    def engine_frames(self) -> list[list[IngressToScheduler]]:
        """The frames that the scheduler is sent now."""
        self.core.submit()
        frames: list[list[IngressToScheduler]] = []
        while frame := dict(self.core.engines.frames()).get(self.engine.peer or SCHEDULER):
            frames.append(frame)
            self.engine.sent(frame)
            for message in frame:
                if isinstance(message, End):
                    self.ended.append((message.uid, message.attempt))
                elif isinstance(message, Held):
                    attempts = unpack(message.attempts).tolist()
                    held = zip(unpack_int64(message.uids), attempts, strict=True)
                    self.held = dict(held)
        return frames

    def submits(self) -> list[Submit]:
        """The requests that the scheduler is given now."""
        messages = [message for frame in self.engine_frames() for message in frame]
        return [message for message in messages if isinstance(message, Submit)]

    def start(self, *ids: str, **keys: Any) -> list[Submit]:
        """Requests that are tokenized, and that the scheduler is given."""
        for request_id in ids:
            self.generate(request_id, **keys)
        self.tokenized(*self.tokenizes())
        return self.submits()

    def scheduler_up(self, peer: Peer, state: EngineState | None = READY) -> None:
        self.core.service_up(peer)
        if state is not None:
            self.core.from_scheduler(peer, state)

    def scheduler_restarts(self, peer: Peer = REBORN, state: EngineState = READY) -> None:
        """The scheduler's link goes and comes back; it is another incarnation, unless `peer` is the
        same."""
        if self.engine.peer is not None:
            self.core.service_down(self.engine.peer)
        self.scheduler_up(peer, state)


def missing(attempts: dict[int, int]) -> Missing:
    return Missing(pack_int64(attempts), pack(attempts.values()))


def decoded(
    of: Submit, start: int, tokens: list[int], *, end: bool = False, attempt: int | None = None
) -> Decoded:
    """Tokens from `start` on; each releases its last digit as text."""
    total = start + len(tokens)
    return Decoded(
        uid=of.uid,
        attempt=of.attempt if attempt is None else attempt,
        token_offset=start,
        text_offset=start,
        token_ids=pack(tokens),
        text="".join(str(token % 10) for token in tokens),
        logprobs=(),
        ending=Ending("length", Usage(3, total, 2)) if end else None,
    )
