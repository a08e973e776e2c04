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

_encoder = msgspec.msgpack.Encoder()


@dataclass(slots=True, eq=False)
class Exchange:
    """A message behind an empty delimiter (REQ), answered by one frame when all of it has its end.

    Attributes:
        unanswered: requests that run, and one while the message is still being read.
        answers: what the reply holds so far.
        ended: the requests whose last message is among them.
    """

    unanswered: int = 1
    answers: list[ServerMessage] = field(default_factory=list)
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
        answers: messages that belong to no running request, in the order of arrival.
        num_answers: how many answers are held, those of exchanges included.
        closed: the client has gone.
    """

    def __init__(self, connection: bytes, name: str) -> None:
        self.connection = connection
        self.name = name
        self.requests: dict[str, Request] = {}
        self.num_answers = 0
        self.closed = False
        self._answers: list[ServerMessage] = []
        self._unsent: list[Request] = []
        self._replies: deque[Exchange] = deque()
        self._held: Outgoing | None = None

    def answer(self, message: ServerMessage, exchange: Exchange | None) -> None:
        """Owes the client a message that is not a request's output."""
        self.num_answers += 1
        (self._answers if exchange is None else exchange.answers).append(message)

    def has_news(self, request: Request) -> None:
        """`request` has output or an outcome to send."""
        exchange = request.exchange
        if exchange is not None:
            if request.outcome is not None:
                self.answer(request.outcome, exchange)
                exchange.ended.append(request)
                self.answered(exchange)
        elif not request.unsent and (request.stream or request.outcome is not None):
            request.unsent = True
            self._unsent.append(request)

    def answered(self, exchange: Exchange) -> None:
        """One part of an exchange is done."""
        exchange.unanswered -= 1
        if exchange.unanswered == 0:
            self._replies.append(exchange)

    def outgoing(self) -> Outgoing | None:
        """The next message to send: the same again until `sent`; None if there is nothing."""
        if self._held is None:
            self._held = self._next()
        return self._held

    def sent(self) -> list[Request]:
        """The message is in the socket; returns the requests that have ended with it."""
        held, self._held = self._held, None
        return [] if held is None else held.ended

    def _next(self) -> Outgoing | None:
        if self._replies:
            exchange = self._replies.popleft()
            self.num_answers -= len(exchange.answers)
            return Outgoing([b"", _encoder.encode(exchange.answers)], exchange.ended)
        messages = self._answers
        self._answers = []
        self.num_answers -= len(messages)
        ended: list[Request] = []
        for request in self._unsent:
            request.unsent = False
            messages += request.take()
            if request.outcome is not None:
                ended.append(request)
        self._unsent.clear()
        return Outgoing([_encoder.encode(messages)], ended) if messages else None
