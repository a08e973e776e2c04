"""Streamed answers, with stand-ins for the pipeline's streams."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import pytest
from starlette.types import Message

from nanovllm.client.results import Completion, Delta, Usage
from nanovllm.services.http.context import DoorContext
from nanovllm.services.http.openai.answers import ChatChunk, ChatChunkChoice, ChatDelta
from nanovllm.services.http.openai.chunks import Chunks
from nanovllm.services.http.streams import EventStream
from nanovllm.services.http.turns import ENTRIES_A_TURN


class Stream:
    """A request's stream: what waits, and whether the request has ended."""

    def __init__(self, first: Delta) -> None:
        self.unread = [first]
        self.ended = False

    def take(self) -> list[Delta]:
        taken, self.unread = self.unread, []
        return taken


class Calls:
    def __init__(self, first: Delta, choices: int = 1) -> None:
        self.streams = [Stream(first) for _ in range(choices)]
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


class LateOutput:
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
        Delta("first ", [1] * 1000, [[(1, 0.0)] * 5] * 1000),
    ],
)
def test_output_that_comes_while_large_events_are_made_is_not_lost(first: Delta) -> None:
    calls = Calls(first)
    text = asyncio.run(streamed([(calls, [LateOutput(calls.streams[0])])]))
    assert text.index(b"first ") < text.index(b'"last"') < text.index(b'"stop"')


def test_a_turn_of_the_event_loop_writes_some_of_the_logprobs_that_wait() -> None:
    """Also if several slow clients with several choices can be sent something at once."""
    waits = Delta("waits", [1] * 40, [[(1, 0.0)] * 21] * 40)
    turn, entries = 0, Counter[int]()

    class Output:
        def __init__(self, stream: Stream) -> None:
            self._stream = stream

        def begin(self) -> list[Any]:
            return []

        def news(self, delta: Delta) -> list[Any]:
            entries[turn] += sum(map(len, delta.logprobs or ()))
            self._stream.ended = True
            return [ChatChunkChoice(0, ChatDelta(content=delta.text))]

        def end(self, completion: Completion) -> list[Any]:
            return []

    async def count_turns() -> None:
        nonlocal turn
        while True:
            await asyncio.sleep(0)
            turn += 1

    async def test() -> bytes:
        counting = asyncio.create_task(count_turns())
        clients = [Calls(waits, 8) for _ in range(10)]
        text = await streamed([(calls, list(map(Output, calls.streams))) for calls in clients])
        counting.cancel()
        return text

    assert asyncio.run(test()).count(b"waits") == 80
    assert entries.total() == 80 * 40 * 21
    assert max(entries.values()) <= 2 * ENTRIES_A_TURN


async def streamed(answers: Sequence[tuple[Any, Sequence[Any]]]) -> bytes:
    """What one server sends in these streams, at the same time."""
    context = DoorContext(cast(Any, None), cast(Any, None))
    sent: list[bytes] = []

    async def send(message: Message) -> None:
        sent.append(message.get("body", b""))

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async with asyncio.TaskGroup() as group:
        for calls, outputs in answers:
            form = Chunks(ChatChunk(id="1", created=0, model="m", choices=[]), None)
            group.create_task(EventStream(form, calls, outputs, context)({}, receive, send))
    return b"".join(sent)
