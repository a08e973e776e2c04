"""Streamed answers, with stand-ins for the pipeline's streams."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import Any

import pytest
from starlette.types import Message

from nanovllm.client.results import Completion, Delta, Usage
from nanovllm.services.http.metrics import Recorder
from nanovllm.services.http.responses import ChatChunk, ChatChunkChoice, ChatDelta
from nanovllm.services.http.streams import EventStream


class Stream:
    """A request's stream: what waits, and whether the request has ended."""

    def __init__(self, first: Delta) -> None:
        self.unread = [first]
        self.ended = False

    def take(self) -> list[Delta]:
        taken, self.unread = self.unread, []
        return taken


class Calls:
    def __init__(self, first: Delta) -> None:
        self.streams = [Stream(first)]
        self.changed = asyncio.Event()
        self.gone = False
        self.began_at = time.monotonic()

    async def result(self, stream: Stream) -> Completion:
        return Completion("first last", [1, 2], "stop", Usage(1, 2, 0), None, None)

    async def change(self) -> None:
        await self.changed.wait()
        self.changed.clear()

    def closing(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()


class Output:
    """While the first events are made, in a thread, the stream goes on and ends."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def begin(self) -> list[Any]:
        return []

    def news(self, delta: Delta) -> list[Any]:
        if not self._stream.ended:
            assert threading.current_thread() is not threading.main_thread()
            self._stream.unread.append(Delta("last", [2], None))
            self._stream.ended = True
        return [ChatChunkChoice(0, ChatDelta(content=delta.text))]

    def end(self, completion: Completion) -> list[Any]:
        return [ChatChunkChoice(0, ChatDelta(), "stop")]


@pytest.mark.parametrize(
    "first",
    [
        Delta("first ", [1], None, prompt_logprobs=[None]),
        Delta("first ", [1] * 1000, [[(1, 0.0)]] * 1000),
    ],
)
def test_output_that_comes_while_large_events_are_made_is_not_lost(first: Delta) -> None:
    async def body() -> bytes:
        calls: Any = Calls(first)
        chunk = ChatChunk(id="1", created=0, model="m", choices=[])
        stream = EventStream(chunk, calls, [Output(calls.streams[0])], Recorder(), None)
        sent: list[bytes] = []

        async def send(message: Message) -> None:
            sent.append(message.get("body", b""))

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        await stream({}, receive, send)
        return b"".join(sent)

    text = asyncio.run(body())
    assert text.index(b"first ") < text.index(b'"last"') < text.index(b'"stop"')
