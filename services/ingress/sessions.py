"""What a client is owed, and how it is cut into frames.

Nothing is queued beside the socket but one frame that it would not take: what comes meanwhile is
kept by the requests, and goes out merged.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import msgspec

from nanovllm.protocol import ServerMessage
from nanovllm.services.ingress.requests import Request

# What an answer takes in memory beside its bytes, roughly.
OVERHEAD_BYTES = 128

_encoder = msgspec.msgpack.Encoder()


@dataclass(slots=True, eq=False)
class Exchange:
    """A message behind an empty delimiter (REQ), answered by one frame when all of it has its end.

    Attributes:
        unanswered: requests that run, and one while the message is still being read.
        answers: what the reply holds so far, encoded.
        ended: the requests whose last message is among them.
    """

    unanswered: int = 1
    answers: list[msgspec.Raw] = field(default_factory=list)
    ended: list[Request] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Outgoing:
    """A ZeroMQ message for a client, and the requests that end once it is sent."""

    parts: list[bytes]
    ended: list[Request]


class Session:
    """One connection in one life of the ingress.

    Attributes:
        connection: the ROUTER's routing id.
        name: what the client is told.
        requests: those that have not ended for the client, by the client's id.
        full_since: since when its socket takes nothing (seconds); None while it does.
        closed: the client has gone.
    """

    def __init__(self, connection: bytes, name: str) -> None:
        self.connection = connection
        self.name = name
        self.requests: dict[str, Request] = {}
        self.full_since: float | None = None
        self.closed = False
        # Messages that are not a stream's, encoded, in the order of arrival; and the requests whose
        # last message is among them.
        self._answers: list[msgspec.Raw] = []
        self._ended: list[Request] = []
        # Those of exchanges included.
        self._answer_bytes = 0
        self._output_bytes = 0
        self._unsent: list[Request] = []
        self._replies: deque[Exchange] = deque()
        self._held: Outgoing | None = None

    @property
    def unread_bytes(self) -> int:
        """What is kept for the client, roughly, beside the one message that was given out."""
        return self._answer_bytes + self._output_bytes

    def answer(self, message: ServerMessage, exchange: Exchange | None) -> None:
        """Owes the client a message that is not a request's output."""
        raw = msgspec.Raw(_encoder.encode(message))
        self._answer_bytes += _size(raw)
        (self._answers if exchange is None else exchange.answers).append(raw)

    def has_news(self, request: Request, size: int = 0) -> None:
        """`request` has output, which takes `size` bytes, or an outcome to send."""
        if request.stream:
            self._output_bytes += size
            if not request.unsent:
                request.unsent = True
                self._unsent.append(request)
        elif request.outcome is not None:
            exchange = request.exchange
            self.answer(request.outcome, exchange)
            (self._ended if exchange is None else exchange.ended).append(request)
            if exchange is not None:
                self.answered(exchange)

    def answered(self, exchange: Exchange) -> None:
        """One part of an exchange is done."""
        exchange.unanswered -= 1
        if exchange.unanswered == 0:
            self._answer_bytes += OVERHEAD_BYTES
            self._replies.append(exchange)

    def outgoing(self) -> Outgoing | None:
        """The next message to send: the same again until `sent`; None if there is nothing."""
        if self._held is None:
            self._held = self._next()
        return self._held

    def sent(self) -> list[Request]:
        """The message is in the socket; returns the requests that have ended with it."""
        held, self._held = self._held, None
        self.full_since = None
        return [] if held is None else held.ended

    def _next(self) -> Outgoing | None:
        if self._replies:
            exchange = self._replies.popleft()
            self._answer_bytes -= OVERHEAD_BYTES + sum(map(_size, exchange.answers))
            return Outgoing([b"", _encoder.encode(exchange.answers)], exchange.ended)
        messages: list[msgspec.Raw | ServerMessage] = [*self._answers]
        self._answer_bytes -= sum(map(_size, self._answers))
        self._answers.clear()
        self._output_bytes = 0
        ended, self._ended = self._ended, []
        for request in self._unsent:
            request.unsent = False
            messages += request.take()
            if request.outcome is not None:
                ended.append(request)
        self._unsent.clear()
        return Outgoing([_encoder.encode(messages)], ended) if messages else None


def _size(answer: msgspec.Raw) -> int:
    return OVERHEAD_BYTES + memoryview(answer).nbytes
