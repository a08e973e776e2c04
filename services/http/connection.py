"""uvicorn's HTTP protocol, with what the application needs of the connection beneath it."""

from __future__ import annotations

import asyncio
import socket
from typing import Final

from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

# A client whose socket takes nothing for so long is disconnected, by the kernel.
TAKES_NOTHING_S: Final = 30.0


class DoorProtocol(HttpToolsProtocol):
    """`http=DoorProtocol` in uvicorn's Config.

    A request's `scope["extensions"]["transport"]` is its connection's transport, so that the
    application can end a connection whose client does not read.
    """

    takes_nothing_s: float = TAKES_NOTHING_S

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family != socket.AF_UNIX:
            limit_ms = int(self.takes_nothing_s * 1000)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {"transport": {"transport": self.transport}}

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            _send_unframed(self.cycle)


def _send_unframed(cycle: RequestResponseCycle) -> None:
    """Has a response sent without chunked encoding, which HTTP/1.0 does not know: the connection's
    end is the body's."""
    send = cycle.send

    async def send_unframed(message: ASGISendEvent) -> None:
        if message["type"] == "http.response.body":
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.chunked_encoding = False
    cycle.send = send_unframed  # type: ignore[method-assign]
