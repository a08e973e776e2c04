"""Server-sent events: the chunks of a streamed answer, for fast readers and slow ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanovllm.client.aio import AsyncStream
from nanovllm.client.results import Completion, Delta
from nanovllm.client.results import Usage as PipelineUsage
from nanovllm.services.http.calls import Calls, made
from nanovllm.services.http.context import DoorContext
from nanovllm.services.http.errors import ApiError, ErrorAnswer
from nanovllm.services.http.responses import ChatChunk, TextCompletion, Usage
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

_encode = msgspec.json.Encoder().encode


class Output(Protocol):
    """One choice's output, as the choices of chunks."""

    def begin(self) -> list[Any]: ...

    def news(self, delta: Delta) -> list[Any]:
        """What new output gives."""

    def end(self, completion: Completion) -> list[Any]: ...


class EventStream(Response):
    """Streams the output of requests that were accepted.

    All that waits when the client's socket has room is sent in one piece, merged into one chunk a
    choice. So a slow client holds nothing up but itself.

    Args:
        chunk: a chunk without choices.
        calls: the requests; closed with the stream.
        outputs: what makes chunks of each request's output.
        usage: the answer's, of the requests' in order, which comes in a chunk of its own at the
            end; None for no such chunk.
    """

    def __init__(
        self,
        chunk: ChatChunk | TextCompletion,
        calls: Calls,
        outputs: Sequence[Output],
        context: DoorContext,
        usage: Callable[[list[PipelineUsage]], Usage] | None,
    ) -> None:
        super().__init__(
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
            media_type="text/event-stream",
        )
        del self.headers["content-length"]
        self._chunk = chunk
        if usage is not None:
            chunk.usage = None
        before, mark, after = _encode(chunk).partition(b'"choices":[')
        self._head, self._tail = b"data: " + before + mark, after + b"\n\n"
        self._calls = calls
        self._running = dict(zip(calls.streams, outputs, strict=True))
        self._recorder = context.recorder
        self._turns = context.turns
        self._usage = usage
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
        body = b"".join(map(self._event, (c for o in self._running.values() for c in o.begin())))
        usages: dict[AsyncStream, PipelineUsage] = {}
        try:
            while self._running:
                if body:
                    await self._send(send, body)
                await self._calls.change()
                if self._calls.gone:
                    return
                body = await self._news(usages)
                if not body and self._sent_at + COMMENT_S <= time.monotonic():
                    body = b": waiting\n\n"
            if self._usage is not None:
                self._chunk.usage = self._usage([usages[s] for s in self._calls.streams])
                body += b"data: " + _encode(self._chunk) + b"\n\n"
        except ApiError as error:
            body = b"data: " + _encode(ErrorAnswer(error.body)) + b"\n\n"
        await self._send(send, body + b"data: [DONE]\n\n", more=False)

    async def _send(self, send: Send, body: bytes, *, more: bool = True) -> None:
        """Waits until the socket has room, and gives it the body."""
        self._sending = len(body)
        await send({"type": "http.response.body", "body": body, "more_body": more})
        self._sending = 0
        self._sent_at = time.monotonic()

    async def _news(self, usages: dict[AsyncStream, PipelineUsage]) -> bytes:
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
                events += map(self._event, output.end(completion))
                del self._running[stream]
        return b"".join(events)

    def _news_of(self, output: Output, delta: Delta) -> bytes:
        return b"".join(map(self._event, output.news(delta)))

    def _observe(self, stream: AsyncStream, deltas: list[Delta]) -> None:
        now = time.monotonic()
        before = self._output_at.get(stream)
        self._output_at[stream] = now
        tokens = sum(len(delta.token_ids) for delta in deltas)
        since = self._calls.began_at if before is None else before
        self._recorder.output(now - since, tokens, before is None)

    def _event(self, choice: msgspec.Struct) -> bytes:
        return self._head + _encode(choice) + self._tail

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
