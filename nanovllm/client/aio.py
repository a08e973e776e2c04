"""The asyncio client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, Literal, overload

from nanovllm.client.connection import Connection
from nanovllm.client.requests import Messages, Prompt, as_messages, generate_message
from nanovllm.client.results import Completion, Delta
from nanovllm.client.tickets import Request, Ticket
from nanovllm.protocol import Pong
from nanovllm.sampling_params import SamplingParams
from nanovllm.settings import DEFAULT_INGRESS


class AsyncClient:
    """`Client` for asyncio: any number of concurrent requests over one socket.

    It belongs to the event loop in which it was made. Cancelling a task that waits for a request
    aborts that request.

    Args:
        endpoint, timeout: as for Client.

    Raises:
        RuntimeError: there is no running event loop.
        ValueError: if `endpoint` is not one.
    """

    def __init__(self, endpoint: str = DEFAULT_INGRESS, timeout: float = 10.0) -> None:
        self._loop = asyncio.get_running_loop()
        self._watched: Sequence[int] = ()
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: dict[Ticket, set[asyncio.Future[None]]] = {}
        self._closed = False
        self._connection = Connection(endpoint, timeout, self._watch)

    @overload
    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        stream: Literal[False] = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        cache_salt: str | None = None,
    ) -> Coroutine[Any, Any, Completion]: ...

    @overload
    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        stream: Literal[True],
        chat_template_kwargs: Mapping[str, Any] | None = None,
        cache_salt: str | None = None,
    ) -> AsyncStream: ...

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        stream: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        cache_salt: str | None = None,
    ) -> Coroutine[Any, Any, Completion] | AsyncStream:
        """As Client's: `await client.generate(…)` gives the Completion,
        `async for delta in client.generate(…, stream=True)` its deltas."""
        core = self._connection.core
        message = generate_message(
            core.new_id(),
            prompt,
            sampling_params,
            stream=stream,
            chat_template_kwargs=chat_template_kwargs,
            cache_salt=cache_salt,
        )
        reader = AsyncStream(self, core.submit(message))
        self._pump()
        return reader if stream else reader.result()

    @overload
    def chat(
        self,
        messages: str | Messages,
        sampling_params: SamplingParams | None = None,
        *,
        stream: Literal[False] = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Coroutine[Any, Any, Completion]: ...

    @overload
    def chat(
        self,
        messages: str | Messages,
        sampling_params: SamplingParams | None = None,
        *,
        stream: Literal[True],
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> AsyncStream: ...

    def chat(
        self,
        messages: str | Messages,
        sampling_params: SamplingParams | None = None,
        *,
        stream: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Coroutine[Any, Any, Completion] | AsyncStream:
        """`generate` from chat messages; a str is one message of the user's."""
        prompt, kwargs = as_messages(messages), chat_template_kwargs
        if stream:
            return self.generate(prompt, sampling_params, stream=True, chat_template_kwargs=kwargs)
        return self.generate(prompt, sampling_params, chat_template_kwargs=kwargs)

    async def ping(self) -> Pong:
        """As Client's."""
        inquiry = self._connection.core.ping()
        self._pump()
        try:
            while not inquiry.ended:
                await self._changed(inquiry)
        finally:
            self._connection.core.abandon(inquiry)
        return inquiry.result()

    async def close(self) -> None:
        """Disconnects; what is unfinished is aborted, and whoever waits for it is told."""
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

    async def _changed(self, ticket: Ticket) -> None:
        """Waits until `ticket` has changed.

        Raises RuntimeError if the client is closed first.
        """
        if not self._closed:
            waiting = self._loop.create_future()
            waiters = self._waiting.setdefault(ticket, set())
            waiters.add(waiting)
            try:
                await waiting
            finally:
                waiters.remove(waiting)
                if not waiters:
                    del self._waiting[ticket]
        if self._closed and not ticket.ended:
            if (task := asyncio.current_task()) is not None:
                task.add_done_callback(_retrieve)
            raise RuntimeError("the client is closed")

    def _wake(self, *tickets: Ticket) -> None:
        for ticket in tickets:
            for waiting in self._waiting.get(ticket, ()):
                if not waiting.done():
                    waiting.set_result(None)

    def _abandon(self, request: Request) -> None:
        """Aborts a request; its reader is gone."""
        if not self._closed:
            self._connection.core.abandon(request)
            self._pump()

    def _pump(self) -> None:
        self._wake(*self._connection.pump())
        if self._timer is not None:
            self._timer.cancel()
        wait = self._connection.core.wait_s(time.monotonic())
        if self._connection.pending:
            wait = 0.0
        self._timer = None if wait is None else self._loop.call_later(wait, self._pump)

    def _watch(self, descriptors: Sequence[int]) -> None:
        for descriptor in self._watched:
            self._loop.remove_reader(descriptor)
        for descriptor in descriptors:
            self._loop.add_reader(descriptor, self._pump)
        self._watched = descriptors


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Of a task that the client's end has ended: whoever awaits it is told, and asyncio does not
    complain if nobody does."""
    if not task.cancelled():
        task.exception()


class AsyncStream(AsyncIterator[Delta]):
    """The output of one request as it comes. Closing or dropping it before its end, or cancelling
    the task that waits for it, aborts the request."""

    def __init__(self, client: AsyncClient, request: Request) -> None:
        self._client = client
        self._request = request

    async def __anext__(self) -> Delta:
        """
        Raises:
            RequestError: the pipeline refused it or gave it up.
            PipelineUnavailable: the pipeline is gone.
        """
        await self._wait(until_end=False)
        if self._request.deltas:
            return self._request.deltas.popleft()
        self._request.result()
        raise StopAsyncIteration

    async def result(self) -> Completion:
        """Waits for the end; the whole output, with what has been iterated over already."""
        await self._wait(until_end=True)
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
        # A destructor runs anywhere, in the middle of the client's work too.
        if not self._request.ended and not self._client._loop.is_closed():
            self._client._loop.call_soon_threadsafe(self._client._abandon, self._request)

    async def _wait(self, until_end: bool) -> None:
        try:
            while not self._request.ended and (until_end or not self._request.deltas):
                await self._client._changed(self._request)
        except BaseException:
            self.close()
            raise
