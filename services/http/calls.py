"""The pipeline's requests behind one HTTP request: one for each choice."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from starlette.requests import Request

from nanovllm.client.aio import AsyncStream
from nanovllm.client.results import Completion, PipelineUnavailable, RequestError
from nanovllm.protocol import Generate
from nanovllm.services.http.context import DoorContext
from nanovllm.services.http.errors import ApiError, api_error

T = TypeVar("T")

MAX_CLIENT_BYTES: Final = 128
# One, since threads take their turns from the event loop.
_thread: Final = ThreadPoolExecutor(1, "large answers")


class ClientGone(Exception):
    """The HTTP client has disconnected: nobody reads an answer."""


class Calls:
    """Submits requests, waits for them, and aborts them when the HTTP client disconnects.

    Args:
        request: its body has been read.
        messages: what to submit.
        answer_key: the key of the body that is `structured_outputs` to the pipeline.

    Attributes:
        streams: a stream for each message.
        changed: set whenever one of the streams, or the HTTP client, has changed.
        gone: whether the HTTP client has disconnected.
        began_at: when the requests were submitted (`time.monotonic`).

    Raises:
        ApiError: a message cannot be sent.
    """

    def __init__(
        self, context: DoorContext, request: Request, messages: list[Generate], answer_key: str
    ) -> None:
        self.changed = asyncio.Event()
        self.gone = False
        self.streams: list[AsyncStream] = []
        self._recorder = context.recorder
        self._answer_key = answer_key
        self.began_at = time.monotonic()
        self._running: set[AsyncStream] = set()
        self._watch: asyncio.Task[None] | None = None
        try:
            for message in messages:
                stream = context.client.submit(message, self.changed.set)
                self._recorder.began()
                self.streams.append(stream)
                self._running.add(stream)
        except (OverflowError, RecursionError) as error:
            self.close()
            raise ApiError(400, f"a value cannot be sent: {error}") from None
        self._watch = asyncio.create_task(self._until_gone(request))

    async def answered(self) -> None:
        """Waits until the pipeline has accepted all requests; closes if it has not.

        Raises:
            ApiError: the pipeline has refused one.
            ClientGone.
        """
        try:
            while True:
                for stream in [stream for stream in self._running if stream.ended]:
                    await self.result(stream)
                if all(stream.answered for stream in self.streams):
                    return
                await self._change()
        except BaseException:
            self.close()
            raise

    async def results(self) -> list[Completion]:
        """Waits for the end of all requests, and closes; raises what `answered` raises."""
        with self.closing():
            while self._running:
                for stream in [stream for stream in self._running if stream.ended]:
                    await self.result(stream)
                if self._running:
                    await self._change()
            return [await stream.result() for stream in self.streams]

    async def result(self, stream: AsyncStream) -> Completion:
        """The output of a stream that has ended.

        Raises ApiError if the pipeline has refused it or given it up.
        """
        try:
            completion = await stream.result()
        except (RequestError, PipelineUnavailable) as error:
            code = error.code if isinstance(error, RequestError) else "unavailable"
            self._end(stream, code)
            raise api_error(error, self._answer_key) from None
        self._end(stream, completion.finish_reason)
        return completion

    def close(self) -> None:
        """Aborts what is running."""
        for stream in list(self._running):
            stream.close()
            self._end(stream, "abort")
        if self._watch is not None:
            self._watch.cancel()

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.close()

    def _end(self, stream: AsyncStream, reason: str) -> None:
        if stream in self._running:
            self._running.remove(stream)
            self._recorder.ended(reason, time.monotonic() - self.began_at)

    async def change(self) -> None:
        """Waits until one of the streams, or the HTTP client, has changed.

        Raises ApiError if the server ends meanwhile: uvicorn cancels what is unfinished then.
        """
        try:
            await self.changed.wait()
        except asyncio.CancelledError:
            message = "the server is shutting down; try again"
            raise ApiError(503, message, code="shutting_down") from None
        self.changed.clear()

    async def _change(self) -> None:
        if not self.gone:
            await self.change()
        if self.gone:
            raise ClientGone

    async def _until_gone(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self.changed.set()


async def made(make: Callable[[], T], *, large: bool) -> T:
    """What `make` makes; in a thread if that may be large, so that the event loop goes on."""
    if not large:
        return make()
    return await asyncio.get_running_loop().run_in_executor(_thread, make)


def client_name(request: Request) -> str:
    """Whose request it is, for the turns that clients take."""
    name = request.scope.get("state", {}).get("client_name")
    if name is None and request.client is not None:
        name = request.client.host
    return str(name or "unknown")[:MAX_CLIENT_BYTES]
