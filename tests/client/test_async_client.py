"""The asyncio client over real sockets, against a double of the ingress."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from nanovllm import AsyncClient, PipelineUnavailable, RequestError, SamplingParams
from nanovllm.protocol import Abort, Error, Generate
from tests.client.double import (
    TIMEOUT_S,
    Answer,
    HangUp,
    IngressDouble,
    answer_in_full,
    ingress,
    text_of,
    whole_answer,
)
from tests.client.test_client import has_abort, some_then_silence


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await test()

    asyncio.run(limited())


async def aborted(double: IngressDouble) -> None:
    await asyncio.to_thread(double.wait_for, has_abort)


def test_completions_and_streams() -> None:
    async def test() -> None:
        async with AsyncClient(double.endpoint) as client:
            completion = await client.generate("hello", SamplingParams(max_tokens=3))
            assert completion.token_ids == [5, 6, 7]
            stream = client.chat("hi", SamplingParams(max_tokens=5), stream=True)
            assert [delta.token_ids async for delta in stream] == [[0, 1], [2, 3], [4]]
            assert (await stream.result()).text == text_of([0, 1, 2, 3, 4])
            assert (await client.ping()).ready

    with ingress(answer_in_full) as double:
        run(test)


def test_many_streams_over_one_socket_survive_deaths_of_the_ingress() -> None:
    deaths = [150, 90, 40, 10]
    answered = 0

    def script(message: Any, session: str) -> Iterator[Answer]:
        nonlocal answered
        for answer in whole_answer(message, session):
            yield answer
            answered += 1
            if deaths and answered >= deaths[-1]:
                deaths.pop()
                yield HangUp()

    async def one(client: AsyncClient, number: int) -> None:
        params = SamplingParams(max_tokens=9)
        stream = client.generate([1] * number, params, stream=True)
        tokens = [token async for delta in stream for token in delta.token_ids]
        assert tokens == list(range(number, number + 9))
        assert (await stream.result()).text == text_of(tokens)

    async def test() -> None:
        async with AsyncClient(double.endpoint) as client, asyncio.TaskGroup() as tasks:
            for number in range(1, 51):
                tasks.create_task(one(client, number))

    with ingress(script) as double:
        run(test)
        assert not deaths


def test_cancelling_a_task_aborts_its_request_alone() -> None:
    def script(message: Any, session: str) -> Iterator[Answer]:
        if isinstance(message, Generate) and message.prompt == "held":
            yield from some_then_silence(message, session)
        else:
            yield from answer_in_full(message, session)

    async def test() -> None:
        async with AsyncClient(double.endpoint) as client:
            stream = client.generate("held", stream=True)
            assert (await anext(stream)).text == "a"
            held = asyncio.create_task(stream.result())
            await asyncio.sleep(0)
            held.cancel()
            with pytest.raises(asyncio.CancelledError):
                await held
            await aborted(double)
            assert (await client.generate("other")).finish_reason == "length"

    with ingress(script) as double:
        run(test)
        assert [m.id for m in double.received if isinstance(m, Abort)] == [double.generates[0].id]


@pytest.mark.parametrize("how", ["close", "async with", "drop", "break"])
def test_leaving_a_stream_early_aborts_it(how: str) -> None:
    async def read_one(client: AsyncClient) -> None:
        if how == "async with":
            async with client.generate("x", stream=True) as stream:
                await anext(stream)
        elif how == "break":
            async for _ in client.generate("x", stream=True):
                break
        else:
            stream = client.generate("x", stream=True)
            await anext(stream)
            if how == "close":
                stream.close()

    async def test() -> None:
        async with AsyncClient(double.endpoint) as client:
            await read_one(client)
            gc.collect()
            await aborted(double)

    with ingress(some_then_silence) as double:
        run(test)


def test_errors() -> None:
    def script(message: Any, session: str) -> Iterator[Answer]:
        yield Error(id=message.id, code="overloaded", message="try later")

    async def test() -> None:
        async with AsyncClient(double.endpoint) as client:
            with pytest.raises(RequestError, match="overloaded: try later"):
                await client.generate("x")
        with pytest.raises(RuntimeError, match="closed"):
            await client.generate("x")
        async with AsyncClient("tcp://127.0.0.1:1", timeout=0.4) as client:
            with pytest.raises(PipelineUnavailable, match="nanovllm-launch"):
                await client.generate("x")

    with ingress(script) as double:
        run(test)


def test_closing_the_client_tells_those_who_wait() -> None:
    async def test() -> None:
        client = AsyncClient(double.endpoint)
        stream = client.generate("x", stream=True)
        await anext(stream)
        waiting = asyncio.create_task(stream.result())
        await asyncio.sleep(0)
        await client.close()
        with pytest.raises(RuntimeError, match="closed"):
            await waiting

    with ingress(some_then_silence) as double:
        run(test)


def test_closing_the_client_ends_tasks_that_nobody_awaits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whether they wait, are about to go on, or have not begun; asyncio finds nothing to log."""

    async def test() -> None:
        client = AsyncClient(double.endpoint)
        stream = client.generate("x", stream=True)
        tasks = [asyncio.create_task(anext(stream)), asyncio.create_task(stream.result())]
        await tasks[0]
        tasks.append(asyncio.create_task(client.generate("y")))
        await client.close()
        await asyncio.wait(tasks)
        assert [task.done() for task in tasks] == [True] * 3
        del tasks
        gc.collect()

    with ingress(some_then_silence) as double:
        run(test)
    assert caplog.records == []


def test_two_tasks_may_wait_for_one_stream() -> None:
    async def test() -> None:
        async with AsyncClient(double.endpoint) as client:
            stream = client.generate("x", SamplingParams(max_tokens=5), stream=True)
            whole = asyncio.create_task(stream.result())
            tokens = [token async for delta in stream for token in delta.token_ids]
            assert (await whole).token_ids == tokens
            assert len(tokens) == 5

    with ingress(answer_in_full) as double:
        run(test)
