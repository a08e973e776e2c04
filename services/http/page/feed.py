"""The status of the pipeline, as a stream of events for every page that is open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final

from nanovllm.client.status import to_json
from nanovllm.control import Status
from nanovllm.services.http.errors import ApiError

# How often the supervisor is asked while a page is open. Services report once a second; their
# deaths and starts are seen sooner.
ASK_S: Final = 0.4
MAX_PAGES: Final = 64


class Feed:
    """Asks for the status while a page is open, once for all pages.

    A page that reads slowly gets the latest status when it has room, and misses those before.

    Args:
        ask: tells the status; raises ApiError if the supervisor does not answer.
    """

    def __init__(self, ask: Callable[[], Awaitable[Status]]) -> None:
        self._ask = ask
        self._pages = 0
        self._asking: asyncio.Task[None] | None = None
        self._event = b""
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def is_full(self) -> bool:
        return self._pages >= MAX_PAGES

    async def events(self) -> AsyncGenerator[bytes, None]:
        """A `Status` as JSON in each event, from now until `close`."""
        self._pages += 1
        if self._asking is None:
            self._event = b": the supervisor is asked\n\n"
            self._asking = asyncio.create_task(self._keep_asking())
        sent = b""
        try:
            while not self._closed:
                if self._event is sent:
                    await self._changed.wait()
                else:
                    sent = self._event
                    yield sent
        finally:
            self._pages -= 1
            if not self._pages:
                self._asking.cancel()
                self._asking = None

    def close(self) -> None:
        """Ends the streams, and those to come: pages find the next HTTP server by themselves."""
        self._closed = True
        self._tell()

    async def _keep_asking(self) -> None:
        while True:
            try:
                status = await self._ask()
            except ApiError as error:
                self._event = f": {error}\n\n".encode()
            else:
                self._event = f"data: {to_json(status)}\n\n".encode()
            self._tell()
            await asyncio.sleep(ASK_S)

    def _tell(self) -> None:
        """Wakes all who wait now."""
        self._changed.set()
        self._changed.clear()
