"""What a client is to be sent, and how it is merged into frames.

Only one frame is encoded ahead of the socket. What comes while the socket does not take that frame
is kept by the requests, and goes out merged in the next frame.
"""

from __future__ import annotations

import msgspec

from nanovllm.protocol import ServerMessage
from nanovllm.services.ingress.requests import Request

# What an answer takes in memory beside its bytes, roughly.
OVERHEAD_BYTES = 128

_encoder = msgspec.msgpack.Encoder()


class Session:
    """One connection to one incarnation of the ingress.

    Attributes:
        connection: the ROUTER's routing id.
        name: what the client is told.
        requests: those that have not ended for the client, by the client's id.
        full_since: since when the socket takes nothing (seconds); None while it does.
        unread_bytes: what is kept for the client, roughly, beside the frame of `outgoing`.
    """

    def __init__(self, connection: bytes, name: str) -> None:
        self.connection = connection
        self.name = name
        self.requests: dict[str, Request] = {}
        self.full_since: float | None = None
        self.unread_bytes = 0
        # Encoded messages that are not a stream's, in the order of arrival.
        self._answers: list[msgspec.Raw] = []
        # The requests whose last message is among the answers.
        self._ended: list[Request] = []
        # Streams with output or an outcome to send.
        self._unsent: list[Request] = []
        self._frame: bytes | None = None
        # The requests that end once the frame is sent.
        self._ended_by_frame: list[Request] = []

    def answer(self, message: ServerMessage) -> None:
        """Adds a message that is not a stream's output."""
        raw = _encoder.encode(message)
        self.unread_bytes += OVERHEAD_BYTES + len(raw)
        self._answers.append(msgspec.Raw(raw))

    def has_news(self, request: Request, size: int = 0) -> None:
        """`request` has output, which takes `size` bytes, or an outcome to send."""
        if request.stream:
            self.unread_bytes += size
            if not request.unsent:
                request.unsent = True
                self._unsent.append(request)
        elif request.outcome is not None:
            self.answer(request.outcome)
            self._ended.append(request)

    def outgoing(self) -> bytes | None:
        """The next frame to send: the same again until `sent`; None if there is nothing."""
        if self._frame is None:
            self._frame = self._next_frame()
        return self._frame

    def sent(self) -> list[Request]:
        """The frame is in the socket; returns the requests that have ended with it."""
        self._frame = self.full_since = None
        ended, self._ended_by_frame = self._ended_by_frame, []
        return ended

    def _next_frame(self) -> bytes | None:
        messages: list[msgspec.Raw | ServerMessage] = [*self._answers]
        ended = self._ended
        for request in self._unsent:
            request.unsent = False
            messages += request.take()
            if request.outcome is not None:
                ended.append(request)
        self._answers, self._ended, self._unsent = [], [], []
        self._ended_by_frame = ended
        self.unread_bytes = 0
        return _encoder.encode(messages) if messages else None
