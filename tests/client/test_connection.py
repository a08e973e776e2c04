"""A connection in an event loop, before a socket for which much waits."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from nanovllm.client.connection import BYTES_PER_WAKE_UP, Connection
from nanovllm.client.results import PendingPing
from nanovllm.protocol import Delta, ServerMessage
from nanovllm.transport.router_monitor import readable

FRAME = msgspec.msgpack.encode([Delta(id="gone", offset=0, token_ids=[], text="x" * 30_000)])


def test_a_turn_of_the_event_loop_reads_some_of_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [FRAME] * 100

    async def test() -> None:
        connection = Connection("tcp://127.0.0.1:1", 10.0, None, asyncio.get_running_loop())
        socket: Any = connection._socket
        monkeypatch.setattr(
            "nanovllm.client.connection.readable",
            lambda asked: bool(frames) if asked is socket else readable(asked),
        )
        monkeypatch.setattr(socket, "recv", frames.pop)
        connection.submit(*(PendingPing(lambda: None) for _ in range(10)))
        for _ in range(10):
            connection.submit(PendingPing(lambda: None))
        assert len(frames) == 100, "what waits is read in the loop's next turns"
        read: list[int] = []
        async with asyncio.timeout(60):
            while frames:
                before = len(frames)
                await asyncio.sleep(0)
                read.append(before - len(frames))
        connection.close()
        assert 1 < max(read) <= BYTES_PER_WAKE_UP / len(FRAME) + 1

    assert msgspec.msgpack.decode(FRAME, type=list[ServerMessage])
    asyncio.run(test())
