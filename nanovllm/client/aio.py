"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from nanovllm.client.connection import Connection
from nanovllm.client.requests import GenerateCalls
from nanovllm.client.results import (
    Completion,
    Delta,
    PendingPing,
    PendingRequest,
    StreamClosed,
    new_id,
)
from nanovllm.protocol import Generate, Pong
from nanovllm.settings import DEFAULT_INGRESS


class AsyncClient(GenerateCalls[Coroutine[Any, Any, Completion], "AsyncStream"]):
    """`Client` for asyncio: any number of concurrent requests over one socket.

    `await client.generate(…)` gives the Completion, and `async for delta in client.generate(…,
    stream=True)` its Deltas. Cancelling a task that waits for a request aborts that request. A
    client belongs to the event loop in which it was made.

    Args:
        endpoint, timeout, keys: as for Client.

    Raises:
        RuntimeError: there is no running event loop.
        ValueError: `endpoint` is not an endpoint, or `keys` is no file of keys.
    """

    def __init__(
        self, endpoint: str = DEFAULT_INGRESS, timeout: float = 10.0, keys: str | None = None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = Connection(endpoint, timeout, keys, self._loop)

    def _start(self, message: Generate) -> Coroutine[Any, Any, Completion] | AsyncStream:
        stream = AsyncStream(self, message)
        return stream if message.stream else stream.result()

    def submit(
        self, message: Generate, on_change: Callable[[], object] | None = None
    ) -> AsyncStream:
        """The stream of a request as the protocol has it; its `id` is from `new_id`. Logprobs that
        came in Deltas are not kept for the `result`.

        Args:
            message: where its `stream` is false, the stream has no Deltas, only a `result`.
            on_change: called whenever the request was accepted, has got output or has ended.

        Raises UnicodeEncodeError on text that is not valid Unicode.
        """
        return AsyncStream(self, message, on_change, keeps_logprobs=False)

    def new_id(self) -> str:
        return new_id()

    async def ping(self) -> Pong:
        """As Client's."""
        ended = asyncio.Event()
        ping = PendingPing(ended.set)
        self._connection.submit(ping)
        try:
            await ended.wait()
        finally:
            self._connection.abandon(ping)
        self._retrieve_if_closed()
        return ping.result()

    async def close(self) -> None:
        """Disconnects and aborts what is unfinished; tasks that wait for it get a RuntimeError."""
        self._connection.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _retrieve_if_closed(self) -> None:
        """Retrieves the exception of a task that `close` ends, so that asyncio does not complain if
        nobody awaits the task."""
        if self._connection.closed and (task := asyncio.current_task()) is not None:
            task.add_done_callback(lambda task: task.cancelled() or task.exception())


class AsyncStream(AsyncIterator[Delta]):
    """The output of one request as it comes: an asynchronous iterator of Deltas.

    Closing or dropping a stream before its end aborts the request, and so does cancelling the task
    that waits for it.
    """

    def __init__(
        self,
        client: AsyncClient,
        message: Generate,
        on_change: Callable[[], object] | None = None,
        *,
        keeps_logprobs: bool = True,
    ) -> None:
        self._client = client
        self._waiters: list[asyncio.Future[None]] = []
        # Without a reference to the stream, so that a stream can be dropped.
        self._request = PendingRequest(
            message, partial(_wake, self._waiters, on_change), keeps_logprobs=keeps_logprobs
        )
        self._client._connection.submit(self._request)

    async def accepted(self) -> None:
        """Waits until the pipeline has accepted the request.

        Raises:
            RequestError: the pipeline refused it.
            PipelineUnavailable: the pipeline is gone.
        """
        await self._until(lambda request: request.accepted or bool(request.deltas))
        if self._request.failure is not None:
            raise self._request.failure

    async def __anext__(self) -> Delta:
        """
        Raises:
            RequestError: the pipeline refused it or gave it up.
            PipelineUnavailable: the pipeline is gone.
            StreamClosed: the program has closed the stream.
        """
        if isinstance(self._request.failure, StreamClosed):
            raise self._request.failure
        await self._until(lambda request: bool(request.deltas))
        if self._request.deltas:
            return self._request.deltas.popleft()
        self._request.result()
        raise StopAsyncIteration

    async def result(self) -> Completion:
        """Waits for the end; the whole output, including the Deltas that were iterated over."""
        await self._until(lambda request: request.ended)
        return self._request.result()

    @property
    def answered(self) -> bool:
        """Whether the pipeline has accepted the request, or it has ended."""
        return self._request.accepted or self._request.ended

    @property
    def ended(self) -> bool:
        return self._request.ended

    @property
    def unread(self) -> Sequence[Delta]:
        """The Deltas that have come and were not taken."""
        return self._request.deltas

    def take(self) -> list[Delta]:
        """The Deltas that have come and were not taken, without waiting."""
        deltas = list(self._request.deltas)
        self._request.deltas.clear()
        return deltas

    def close(self) -> None:
        """Aborts the request, unless it has ended."""
        if not self._request.ended:
            self._request.failure = StreamClosed("the stream is closed")
            self._client._connection.abandon(self._request)

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A destructor may run in any thread, and in the middle of the client's work.
        client = self._client
        if not (self._request.ended or client._loop.is_closed() or client._connection.inherited):
            client._loop.call_soon_threadsafe(client._connection.abandon, self._request)

    async def _until(self, condition: Callable[[PendingRequest], bool]) -> None:
        """Waits until the request is so, or has ended."""
        try:
            while not self._request.ended and not condition(self._request):
                self._waiters.append(self._client._loop.create_future())
                await self._waiters[-1]
        except BaseException:
            self.close()
            raise
        self._client._retrieve_if_closed()


def _wake(waiters: list[asyncio.Future[None]], on_change: Callable[[], object] | None) -> None:
    if on_change is not None:
        on_change()
    while waiters:
        if not (waiter := waiters.pop()).done():
            waiter.set_result(None)
