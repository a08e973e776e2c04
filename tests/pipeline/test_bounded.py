"""Ten thousand requests of every kind leave nothing behind, and memory stops growing."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil

from benchmarks.support.pipeline import Pipeline
from nanovllm.protocol import Error
from tests.pipeline.leftovers import wait_until_nothing_is_left
from tests.pipeline.wire import Answer, Wire

REQUESTS = 10_000
CLIENTS = 4
BATCH = 50
LONG = 200
# The smallest leak worth the name, a Python object of a few dozen bytes for each request, is a few
# hundred KiB after five thousand; a record, with its tokens and text, is some MiB. An
# allocator that has not settled yet moves by a few hundred KiB as well.
MOST_GROWTH = 2 << 20
# Small tables, so that the first half of the requests has touched all of them: memory that is used
# for the first time is no leak.
ARGUMENTS = """--device sim --sim-step-ms 0.2 --max-num-seqs 64 --max-model-len 256
 --kvcache-block-size 16 --num-kvcache-blocks 256 --max-num-batched-tokens 1024"""


def requests(draw: random.Random) -> Iterator[dict[str, Any]]:
    """Short ones of every kind, without end."""
    while True:
        sampling: dict[str, Any] = {"max_tokens": draw.randint(1, 6)}
        kind = draw.random()
        if kind < 0.1:
            sampling["logprobs"] = draw.randint(0, 5)
        elif kind < 0.2:
            sampling["stop"] = ["e", "the", "\ufffd"]
        elif kind < 0.3:
            sampling["max_tokens"] = LONG  # to be aborted
        elif kind < 0.35:
            sampling["temperature"] = -1.0
        prompt = [draw.randrange(1000) for _ in range(draw.randint(1, 40))]
        request: dict[str, Any] = {"prompt_token_ids": prompt, "sampling": sampling}
        if kind > 0.97:
            request["prompt_token_ids"] = [5] * 256
        elif kind > 0.9:
            request = {"prompt": "Once upon a time " + str(kind), "sampling": sampling}
        elif kind > 0.85:
            request["resume_token_ids"] = [7, 8]
        elif kind > 0.8:
            request["cache_salt"] = str(kind)
        yield {**request, "stream": draw.random() < 0.7}


def client(pipeline: Pipeline, seed: int, count: int) -> Counter[str]:
    """Sends so many requests, aborts the long ones, and counts how they end. Half of the time it
    leaves while some are unfinished."""
    source = requests(random.Random(seed))
    ends: Counter[str] = Counter()
    for number in range(count // BATCH):
        with Wire(pipeline.endpoint) as wire:
            batch = [next(source) for _ in range(BATCH)]
            answers = wire.ask_all(batch)
            long = [a for a, r in zip(answers, batch, strict=True) if is_long(r)]
            wire.abort(*long[::3])  # at once
            wire.results(*(a for a in answers if a not in long))
            wire.abort(*long[1::3])
            if number % 2:
                wire.results(*long[::3], *long[1::3])
            else:
                wire.abort(*long)
                wire.results(*answers)
            ends.update(outcome(answer) for answer in answers)
    return ends


def is_long(request: dict[str, Any]) -> bool:
    return bool(request["sampling"]["max_tokens"] == LONG)


def outcome(answer: Answer) -> str:
    if answer.end is None:
        return "left"
    return answer.end.code if isinstance(answer.end, Error) else answer.end.finish_reason


def load(pipeline: Pipeline, seed: int, count: int) -> Counter[str]:
    """All clients at once."""
    seeds = range(seed, seed + CLIENTS)
    with ThreadPoolExecutor(CLIENTS) as pool:
        ends = pool.map(lambda each: client(pipeline, each, count // CLIENTS), seeds)
        return sum(ends, Counter())


def memory(pipeline: Pipeline) -> dict[str, int]:
    """Resident bytes of each service."""
    return {
        f"{service.role} {service.index}": psutil.Process(service.pid).memory_info().rss
        for service in pipeline.status().services
    }


def test_ten_thousand_requests_leave_nothing(start_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = start_pipeline("", *ARGUMENTS.split())
    ends = load(pipeline, 0, REQUESTS // 2)
    wait_until_nothing_is_left(pipeline)
    halfway = memory(pipeline)
    ends += load(pipeline, 100, REQUESTS // 2)
    wait_until_nothing_is_left(pipeline)
    assert ends.total() == REQUESTS
    common = {"length", "stop", "abort", "left", "invalid_request", "context_length_exceeded"}
    assert ends.keys() == common
    assert min(ends.values()) > REQUESTS // 200, f"all kinds of ends were there: {ends}"
    growth = {name: now - halfway[name] for name, now in memory(pipeline).items()}
    assert max(growth.values()) < MOST_GROWTH, growth
