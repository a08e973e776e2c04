"""Server-sent events: the chunks of a streamed answer, for fast readers and slow ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanovllm.client.aio import AsyncStream
from nanovllm.client.results import Completion, Delta, Usage
from nanovllm.services.http.calls import Calls, made
from nanovllm.services.http.context import DoorContext
from nanovllm.services.http.errors import ApiError
from nanovllm.services.http.turns import ENTRIES_A_TURN

# A client for which so much waits, beside what is being sent, is disconnected.
MAX_WAITING_BYTES: Final = 4 << 20
# A comment is sent when nothing was for so long, lest something on the way takes the connection
# for dead.
COMMENT_S: Final = 15.0
# How often a stream is looked at.
LOOK_S: Final = 1.0
# What an entry of logprobs takes, about.
ENTRY_BYTES: Final = 64


class Output(Protocol):
    """One request's output, as what events are made of."""

    def begin(self) -> list[Any]: ...

    def news(self, delta: Delta) -> list[Any]:
        """What new output gives."""

    def end(self, completion: Completion) -> list[Any]: ...


class EventForm(Protocol):
    """How events are written."""

    @property
    def waiting(self) -> bytes:
        """What is sent when nothing else was for long."""

    def event(self, made: Any) -> bytes:
        """An event of what an `Output` has made."""

    def last(self, usages: list[Usage]) -> bytes:
        """What comes behind the events of all outputs, whose usages these are."""

    def failed(self, error: ApiError) -> bytes:
        """What comes last where the pipeline has given a request up."""


class EventStream(Response):
    """Streams the output of requests that were accepted.

    All that waits when the client's socket has room is sent in one piece, with the deltas of each
    request merged. So a slow client holds nothing up but itself.

    Args:
        form: writes the events.
        calls: the requests; closed with the stream.
        outputs: of each request.
    """

    def __init__(
        self,
        form: EventForm,
        calls: Calls,
        outputs: Sequence[Output],
        context: DoorContext,
    ) -> None:
        super().__init__(
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
            media_type="text/event-stream",
        )
        del self.headers["content-length"]
        self._form = form
        self._calls = calls
        self._running = dict(zip(calls.streams, outputs, strict=True))
        self._recorder = context.recorder
        self._turns = context.turns
        self._output_at: dict[AsyncStream, float] = {}  # when a stream last had output
        self._sending = 0  # bytes that wait for room in the socket
        self._sent_at = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(self._watch(scope))
        with self._calls.closing():
            try:
                await self._stream(send)
            finally:
                watch.cancel()

    async def _stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._calls.changed.set()  # output may have come with the acceptance
        begun = [made for output in self._running.values() for made in output.begin()]
        body = b"".join(map(self._form.event, begun))
        usages: dict[AsyncStream, Usage] = {}
        try:
            while self._running:
                if body:
                    await self._send(send, body)
                await self._calls.change()
                if self._calls.gone:
                    return
                body = await self._news(usages)
                if not body and self._sent_at + COMMENT_S <= time.monotonic():
                    body = self._form.waiting
            body += self._form.last([usages[stream] for stream in self._calls.streams])
        except ApiError as error:
            body = self._form.failed(error)
        await self._send(send, body, more=False)

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        """Waits until the socket has room, and gives it the body."""
        self._sending = len(body)
        await send({"type": "http.response.body", "body": body, "more_body": more})
        self._sending = 0
        self._sent_at = time.monotonic()

    async def _news(self, usages: dict[AsyncStream, Usage]) -> bytes:
        """The events of all that has come. Forgets the streams that have ended.

        Raises ApiError if the pipeline has given a request up.
        """
        events: list[bytes] = []
        for stream, output in list(self._running.items()):
            while deltas := stream.take():  # more may come, and the end, while events are made
                self._observe(stream, deltas)
                delta = merged(deltas)
                entries = sum(map(len, delta.logprobs or ()))
                large = entries > ENTRIES_A_TURN or delta.prompt_logprobs is not None
                if entries and not large:
                    await self._turns.take(entries)
                make = partial(self._news_of, output, delta)
                events.append(await made(make, large=large))
            if stream.ended:
                completion = await self._calls.result(stream)
                usages[stream] = completion.usage
                events += map(self._form.event, output.end(completion))
                del self._running[stream]
        return b"".join(events)

    def _news_of(self, output: Output, delta: Delta) -> bytes:
        return b"".join(map(self._form.event, output.news(delta)))

    def _observe(self, stream: AsyncStream, deltas: list[Delta]) -> None:
        now = time.monotonic()
        before = self._output_at.get(stream)
        self._output_at[stream] = now
        tokens = sum(len(delta.token_ids) for delta in deltas)
        since = self._calls.began_at if before is None else before
        self._recorder.output(now - since, tokens, before is None)

    async def _watch(self, scope: Scope) -> None:
        """Sees to comments, and disconnects a client that reads too slowly."""
        transport = scope.get("extensions", {}).get("transport", {}).get("transport")
        while True:
            await asyncio.sleep(LOOK_S)
            if not self._sending:
                if self._sent_at + COMMENT_S <= time.monotonic():
                    self._calls.changed.set()
            elif transport is not None and self._unread_bytes() > MAX_WAITING_BYTES:
                transport.abort()

    def _unread_bytes(self) -> int:
        """About what the output takes that no event was made of."""
        return sum(
            len(delta.text) + ENTRY_BYTES * sum(map(len, delta.logprobs or ()))
            for stream in self._running
            for delta in stream.unread
        )


async def respond(
    form: EventForm,
    calls: Calls,
    outputs: Sequence[Output],
    context: DoorContext,
    whole: Callable[[list[Completion]], Response],
    *,
    stream: bool,
    large: bool = False,
) -> Response:
    """Answers with a stream, once the pipeline has accepted, or with the whole.

    Args:
        whole: makes the response of the requests' outputs.
        large: whether that may take long.

    Raises:
        ApiError: the pipeline's answer is an error.
        ClientGone.
    """
    if stream:
        await calls.answered()
        return EventStream(form, calls, outputs, context)
    return await made(partial(whole, await calls.results()), large=large)


def merged(deltas: list[Delta]) -> Delta:
    """The deltas as one."""
    if len(deltas) == 1:
        return deltas[0]
    answer_at, before = None, 0
    for delta in deltas:
        if delta.answer_at is not None:
            answer_at = before + delta.answer_at
        before += len(delta.text)
    return Delta(
        "".join(delta.text for delta in deltas),
        [token for delta in deltas for token in delta.token_ids],
        [entry for delta in deltas for entry in delta.logprobs or ()],
        answer_at,
        deltas[0].prompt_logprobs,
    )
