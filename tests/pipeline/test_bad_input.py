"""Hostile clients beside a good one: its answers are whole, no service ends, nobody is misled."""

from __future__ import annotations

import os
import secrets

import msgspec

from benchmarks.fuzz import FUZZED, fuzz
from tests.pipeline.leftovers import wait_until_nothing_is_left
from tests.pipeline.wire import Wire
from tests.pipelines import Pipeline

SEED = int(os.environ.get("FUZZ_SEED") or secrets.randbits(32))
FRAMES = 20_000
# The first frames of each kind make the allocator take what it keeps.
MOST_GROWTH = 64 << 20


def test_a_short_fuzz() -> None:
    print(f"FUZZ_SEED={SEED}")
    figures = fuzz(FRAMES, SEED)
    assert figures.frames == FRAMES
    assert figures.errors > FRAMES // 3
    assert figures.valid >= 10
    assert figures.restarts == 0
    assert figures.rss_peak - figures.rss_before < MOST_GROWTH


def test_a_flood_of_pings_that_nobody_reads() -> None:
    """The answers that may pile up are bounded, and others are served meanwhile."""
    with Pipeline("", *FUZZED) as sim, Wire(sim.endpoint) as flood, Wire(sim.endpoint) as good:
        frame = msgspec.msgpack.encode([{"type": "ping", "id": "x" * 1000}] * 8000)
        for _ in range(8):
            flood.send(frame)
            answer = good.ask(prompt="x", sampling={"max_tokens": 3})
            good.results(answer)
            assert len(answer.token_ids) == 3
        wait_until_nothing_is_left(sim)
