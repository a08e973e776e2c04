"""The asyncio client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from nanovllm.client.connection import Connection
from nanovllm.client.requests import GenerateCalls
from nanovllm.client.results import Completion, Delta, Pending, PendingRequest
from nanovllm.protocol import Generate, Pong
from nanovllm.settings import DEFAULT_INGRESS


class AsyncClient(GenerateCalls[Coroutine[Any, Any, Completion], "AsyncStream"]):
    """`Client` for asyncio: any number of concurrent requests over one socket.

    `await client.generate(…)` gives the Completion, and `async for delta in client.generate(…,
    stream=True)` its Deltas. Cancelling a task that waits for a request aborts that request. A
    client belongs to the event loop in which it was made.

    Args:
        endpoint, timeout: as for Client.

    Raises:
        RuntimeError: there is no running event loop.
        ValueError: `endpoint` is not an endpoint.
    """

    def __init__(self, endpoint: str = DEFAULT_INGRESS, timeout: float = 10.0) -> None:
        self._loop = asyncio.get_running_loop()
        self._watched: Sequence[int] = ()
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: dict[Pending, asyncio.Event] = {}
        self._closed = False
        self._connection = Connection(endpoint, timeout, self._watch)

    def _start(self, message: Generate) -> Coroutine[Any, Any, Completion] | AsyncStream:
        stream = AsyncStream(self, self._connection.core.submit(message))
        self._pump()
        return stream if message.stream else stream.result()

    def submit(self, message: Generate) -> AsyncStream:
        """The stream of a request as the protocol has it; its `id` is from `new_id`."""
        message.stream = True
        stream = AsyncStream(self, self._connection.core.submit(message))
        self._pump()
        return stream

    def new_id(self) -> str:
        return self._connection.core.new_id()

    async def ping(self) -> Pong:
        """As Client's."""
        ping = self._connection.core.ping()
        self._pump()
        try:
            while not ping.ended:
                await self._changed(ping)
        finally:
            self._abandon(ping)
        return ping.result()

    async def close(self) -> None:
        """Disconnects and aborts what is unfinished; tasks that wait for it get a RuntimeError."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._wake(*self._waiting)
        self._connection.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _changed(self, pending: Pending) -> None:
        """Waits until `pending` has changed.

        Raises RuntimeError if the client is closed first.
        """
        if not self._closed:
            await self._waiting.setdefault(pending, asyncio.Event()).wait()
        if self._closed and not pending.ended:
            if (task := asyncio.current_task()) is not None:
                task.add_done_callback(_retrieve)
            raise RuntimeError("the client is closed")

    def _wake(self, *pendings: Pending) -> None:
        for pending in pendings:
            if (changed := self._waiting.pop(pending, None)) is not None:
                changed.set()

    def _abandon(self, pending: Pending) -> None:
        """Aborts a request, or drops a ping."""
        self._wake(pending)
        if not self._closed:
            self._connection.core.abandon(pending)
            self._pump()

    def _pump(self) -> None:
        self._wake(*self._connection.pump())
        if self._timer is not None:
            self._timer.cancel()
        wait = self._connection.core.wait_s(time.monotonic())
        if self._connection.readable:
            wait = 0.0
        self._timer = None if wait is None else self._loop.call_later(wait, self._pump)

    def _watch(self, descriptors: Sequence[int]) -> None:
        for descriptor in self._watched:
            self._loop.remove_reader(descriptor)
        for descriptor in descriptors:
            self._loop.add_reader(descriptor, self._pump)
        self._watched = descriptors


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Retrieves the exception of a task that `close` has ended, so that asyncio does not complain
    if nobody awaits the task."""
    if not task.cancelled():
        task.exception()


class AsyncStream(AsyncIterator[Delta]):
    """The output of one request as it comes: an asynchronous iterator of Deltas.

    Closing or dropping a stream before its end aborts the request, and so does cancelling the task
    that waits for it.
    """

    def __init__(self, client: AsyncClient, request: PendingRequest) -> None:
        self._client = client
        self._request = request

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
        """
        await self._until(lambda request: bool(request.deltas))
        if self._request.deltas:
            return self._request.deltas.popleft()
        self._request.result()
        raise StopAsyncIteration

    async def result(self) -> Completion:
        """Waits for the end; the whole output, including the Deltas that were iterated over."""
        await self._until(lambda request: request.ended)
        return self._request.result()

    def close(self) -> None:
        """Aborts the request, unless it has ended."""
        if not self._request.ended:
            self._request.failure = RuntimeError("the stream is closed")
            self._client._abandon(self._request)

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A destructor may run in any thread, and in the middle of the client's work.
        if not self._request.ended and not self._client._loop.is_closed():
            self._client._loop.call_soon_threadsafe(self._client._abandon, self._request)

    async def _until(self, condition: Callable[[PendingRequest], bool]) -> None:
        """Waits until the request is so, or has ended."""
        try:
            while not self._request.ended and not condition(self._request):
                await self._client._changed(self._request)
        except BaseException:
            self.close()
            raise
