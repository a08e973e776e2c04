"""Hostile clients beside a good one: the good client's answers are whole,
and no service ends."""

from __future__ import annotations

import contextlib
import os
import secrets
import time

import msgspec
import zmq

from benchmarks.support.pipeline import Pipeline
from nanovllm.control import IngressStats
from tests.fuzz import FUZZED, fuzz
from tests.pipeline.leftovers import wait_until_nothing_is_left
from tests.pipeline.wire import TIMEOUT_S, Wire

SEED = int(os.environ.get("FUZZ_SEED") or secrets.randbits(32))
FRAMES = 20_000
# The first frames of each kind make the allocator take what it keeps.
MOST_GROWTH_MIB = 64


def test_a_short_fuzz() -> None:
    print(f"FUZZ_SEED={SEED}")
    figures = fuzz(FRAMES, SEED)
    assert figures["frames"] == FRAMES
    assert figures["errors"] > FRAMES // 3
    assert figures["valid"]["answered"] >= 10
    assert figures["rss_mib"]["peak"] - figures["rss_mib"]["before"] < MOST_GROWTH_MIB


def test_a_flood_of_pings_that_nobody_reads() -> None:
    """The client that floods is disconnected, and others are served meanwhile."""
    with (
        Pipeline("", *FUZZED) as sim,
        # Without a reconnection: see tests/ingress/test_readers.py.
        Wire(sim.endpoint, RCVHWM=1, RECONNECT_IVL=-1, SNDTIMEO=0) as flood,
        Wire(sim.endpoint) as good,
    ):
        flood.ping()
        good.ping()
        start = time.monotonic()
        frame = msgspec.msgpack.encode({"type": "ping", "id": "x" * 1000})
        while sessions(sim, start) != 1:
            assert time.monotonic() - start < TIMEOUT_S
            with contextlib.suppress(zmq.Again):
                for _ in range(8000):
                    flood.send(frame)
            answer = good.ask(prompt="x", sampling={"max_tokens": 3})
            good.results(answer)
            assert len(answer.token_ids) == 3
        wait_until_nothing_is_left(sim)


def sessions(sim: Pipeline, since: float) -> int | None:
    """How many the ingress has, by a report made after `since`; None before that."""
    (ingress,) = (s for s in sim.status().services if s.role == "ingress")
    assert isinstance(ingress.stats, IngressStats)
    return ingress.stats.sessions if ingress.at_s >= since else None
