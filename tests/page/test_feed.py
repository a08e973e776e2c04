"""The stream of the pipeline's status: one question for all pages, none when no page is open."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator

import pytest

from nanovllm.control import Status
from nanovllm.services.http.errors import ApiError
from nanovllm.services.http.page import feed as feed_module
from nanovllm.services.http.page.feed import Feed

TIMEOUT_S = 30.0


class Supervisor:
    def __init__(self) -> None:
        self.asked = 0
        self.answers = True

    async def status(self) -> Status:
        self.asked += 1
        if not self.answers:
            raise ApiError(503, "it does not answer")
        return Status(str(self.asked), "", "", [])


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "ASK_S", 0.001)


async def told(events: AsyncGenerator[bytes, None]) -> int:
    """The number of the next status."""
    async for event in events:
        if event.startswith(b"data: "):
            return int(json.loads(event[6:])["model"])
    raise AssertionError("the stream has ended")


def test_all_pages_share_one_question() -> None:
    async def run() -> None:
        supervisor = Supervisor()
        feed = Feed(supervisor.status)
        assert supervisor.asked == 0
        pages = [feed.events() for _ in range(20)]
        for _ in range(3):
            await asyncio.gather(*map(told, pages))
        slow, *others = pages
        before = await told(slow)
        while await told(others[0]) < before + 5:
            pass
        assert await told(slow) >= before + 5, "it is given what is past"
        for page in pages:
            await page.aclose()
        asked = supervisor.asked
        assert asked < 60, "each page asks by itself"
        await asyncio.sleep(0.05)
        assert supervisor.asked == asked
        await told(feed.events())  # a page comes again

    asyncio.run(asyncio.wait_for(run(), TIMEOUT_S))


def test_a_page_waits_for_a_supervisor_that_does_not_answer() -> None:
    async def run() -> None:
        supervisor = Supervisor()
        supervisor.answers = False
        events = Feed(supervisor.status).events()
        assert (await anext(events)).startswith(b": ")
        assert await anext(events) == b": it does not answer\n\n"
        supervisor.answers = True
        assert await told(events) > 1

    asyncio.run(asyncio.wait_for(run(), TIMEOUT_S))


def test_streams_end_with_the_server() -> None:
    async def run() -> None:
        feed = Feed(Supervisor().status)
        events = feed.events()
        await told(events)
        feed.close()
        with contextlib.suppress(StopAsyncIteration):
            while True:
                await anext(events)
        assert [event async for event in feed.events()] == []

    asyncio.run(asyncio.wait_for(run(), TIMEOUT_S))
