"""The sessions of clients, and the frames that each client is sent.

Only one frame is encoded ahead of the socket. While the socket does not take that frame, further
output stays with the requests, and goes out merged in the next frame.
"""

from __future__ import annotations

import logging
from collections import deque

import msgspec

from nanovllm.protocol import ServerMessage
from nanovllm.services.ingress.requests import Request
from nanovllm.wording import counted

log = logging.getLogger(__name__)

# What an answer takes in memory beside its bytes, roughly.
OVERHEAD_BYTES = 128
# A client that does not read is treated like a client that has gone. A client does not read if its
# socket has taken nothing for so long (no heartbeat can be sent while its buffers are full), or if
# so much is kept for it.
MAX_FULL_S = 1.2
MAX_UNREAD_BYTES = 16 << 20
# A frame with so much output, roughly, takes no further stream's: while a client decodes a frame,
# it does nothing else.
FRAME_BYTES = 256 << 10

_encoder = msgspec.msgpack.Encoder()


class Session:
    """One client connection to one incarnation of the ingress."""

    def __init__(self, connection: bytes, name: str) -> None:
        self.connection = connection  # the ROUTER's routing id
        self.name = name  # the client is told it
        # The requests that have not ended for the client, by the client's id.
        self.requests: dict[str, Request] = {}
        self.request_bytes = 0  # in the bound of all requests
        # How much is kept for the client, roughly, beside the frame of `outgoing`.
        self.unread_bytes = 0
        # Since when the socket takes nothing; None while it takes frames.
        self._full_since: float | None = None
        # Encoded messages that are not a stream's, in the order of arrival.
        self._answers: list[msgspec.Raw] = []
        # The requests whose last message is among the answers.
        self._ended: list[Request] = []
        # Streams with output or an outcome to send.
        self._unsent: deque[Request] = deque()
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
            request.unsent_bytes += size
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
        self._frame = self._full_since = None
        ended, self._ended_by_frame = self._ended_by_frame, []
        return ended

    def does_not_read(self, now: float) -> bool:
        """The socket has not taken the frame; returns whether to disconnect the client."""
        if self._full_since is None:
            self._full_since = now
        seconds = now - self._full_since
        if seconds < MAX_FULL_S and self.unread_bytes <= MAX_UNREAD_BYTES:
            return False
        log.warning(
            "session %s does not read: nothing for %.1f s, %s wait; it is disconnected, with %s",
            self.name,
            seconds,
            counted(self.unread_bytes, "byte"),
            counted(len(self.requests), "request"),
        )
        return True

    def _next_frame(self) -> bytes | None:
        messages: list[msgspec.Raw | ServerMessage] = [*self._answers]
        ended, size = self._ended, 0
        while self._unsent and (size < FRAME_BYTES or not messages):
            request = self._unsent.popleft()
            size += request.unsent_bytes
            request.unsent, request.unsent_bytes = False, 0
            messages += request.take()
            if request.outcome is not None:
                ended.append(request)
        self._answers, self._ended = [], []
        self._ended_by_frame = ended
        self.unread_bytes = sum(request.unsent_bytes for request in self._unsent)
        return _encoder.encode(messages) if messages else None


class Sessions:
    """All sessions, by connection.

    Args:
        incarnation: this process's; session names begin with it.

    Attributes:
        unsent: sessions with something to send.
    """

    def __init__(self, incarnation: int) -> None:
        self.unsent: set[Session] = set()
        self._incarnation = incarnation
        self._sessions: dict[bytes, Session] = {}
        self._opened = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def of(self, connection: bytes) -> Session:
        """The session of a connection, which is opened if there is none."""
        session = self._sessions.get(connection)
        if session is None:
            self._opened += 1
            session = Session(connection, f"{self._incarnation:08x}-{self._opened}")
            self._sessions[connection] = session
        return session

    def close(self, connection: bytes) -> Session | None:
        """Removes and returns the session of a connection that has ended, if there is one."""
        session = self._sessions.pop(connection, None)
        if session is not None:
            self.unsent.discard(session)
        return session

    def answer(self, session: Session, message: ServerMessage) -> None:
        """Sends a message that is not a stream's output."""
        session.answer(message)
        self.unsent.add(session)

    def has_news(self, request: Request, size: int = 0) -> None:
        """Sends what the request has to send: output, which takes `size` bytes, or an outcome."""
        request.session.has_news(request, size)
        self.unsent.add(request.session)
