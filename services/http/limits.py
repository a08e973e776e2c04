"""What a connection may cost before it brings a request: headers have bounds in time and size."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Final

import msgspec
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from nanovllm.services.http.connection import DoorProtocol
from nanovllm.services.http.errors import ApiError, ErrorAnswer

log = logging.getLogger(__name__)

# Until the headers of a request are there: of the first from the connection on, of a later one from
# its first byte on. A body that is not wanted, since the answer is given, has as long.
HEADERS_S: Final = 10.0
# Headers and trailers; one read more is borne.
HEADERS_BYTES: Final = 64 << 10

_UPGRADE: Final = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
_REASONS: Final = {
    400: "Bad Request",
    408: "Request Timeout",
    413: "Content Too Large",
    431: "Request Header Fields Too Large",
}


class LimitedProtocol(DoorProtocol):
    """A connection that is refused if its requests are malformed, or come too slowly, or are too
    large to be read. `max_body_bytes` bounds a body; the bytes around its chunks count, too, and
    have as much room again."""

    max_body_bytes: int = 8 << 20

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._bytes = 0  # of the request that comes
        self._in_headers = False
        self._in_body = False
        self._timer: asyncio.TimerHandle | None = None
        self._unanswered: list[RequestResponseCycle] = []
        self._deaf = False  # whether what comes is no HTTP, behind requests that are answered
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        for cycle in self._unanswered:  # uvicorn tells the latest alone
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._bytes += len(data)
        super().data_received(data if self._in_body else _without_upgrade(data))
        if self.transport.is_closing() or self._deaf:
            return
        # While a body that is wanted comes, the application looks at the clock.
        if self._timer is None and (self._in_headers or not self._answers()):
            self._await_headers()
        if not self._in_body and self._bytes > HEADERS_BYTES:
            self._refuse(431, f"the headers have more than {HEADERS_BYTES} bytes")
        elif self._bytes > 2 * self.max_body_bytes + HEADERS_BYTES:
            self._refuse(413, "the request has too many bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._bytes = 0
        self._in_headers = True

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        unanswered = [cycle for cycle in self._unanswered if not cycle.response_complete]
        self._unanswered = [*unanswered, self.cycle]
        self._stop_timer()
        self._in_headers, self._in_body = False, True

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._stop_timer()
        self._in_body = False
        self._bytes = 0

    def send_400_response(self, msg: str) -> None:
        unanswered = [cycle for cycle in self._unanswered if not cycle.response_complete]
        if unanswered and not self._in_body:
            unanswered[-1].keep_alive = False  # whole requests have their answers first
            self._deaf = True
            self._stop_timer()
            return
        self._refuse(400, "this is no valid HTTP/1.1 request")

    def _refuse(self, status: int, message: str) -> None:
        """Answers, unless that would be taken for another answer, and disconnects."""
        log.info("%s is disconnected: %s", self.client[0] if self.client else "unknown", message)
        self._stop_timer()
        unanswered = [cycle for cycle in self._unanswered if not cycle.response_complete]
        own = self._in_body and unanswered == [self.cycle] and not self.cycle.response_started
        if own:
            self.cycle.disconnected = True  # this is the answer to the request that comes
        if own or not unanswered:
            body = msgspec.json.encode(ErrorAnswer(ApiError(status, message).body))
            self.transport.write(
                f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
                + body
            )
        self.transport.close()

    def _answers(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_headers(self) -> None:
        self._timer = self.loop.call_later(HEADERS_S, self._too_slow)

    def _too_slow(self) -> None:
        if self._answers():  # to an earlier request
            self._await_headers()
        elif not self.transport.is_closing():
            self._refuse(408, f"no whole request came within {HEADERS_S:g} s")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _without_upgrade(data: bytes) -> bytes:
    """The data, with an Upgrade header renamed: the parser would take no body behind one. Java's
    client asks for HTTP/2 in this way."""
    headers, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"\r\nx-upgrade:", headers) + end + rest
