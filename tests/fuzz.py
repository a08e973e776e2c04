"""Does it stand whatever bytes come? A million malformed frames against a running ingress.

    python -m tests.fuzz --frames 1000000

Three clients send random bytes, valid frames with something wrong in them, truncated ones, arrays
of messages, deep nesting, huge lengths and wrong numbers of frames, over new
connections all the time; one of the three does not read what it is told. Meanwhile valid requests
are made, one at a time, and each must bring what it brings undisturbed. The device is simulated.
Prints one JSON line:

    frames          ZeroMQ messages that were sent
    errors          of which the two clients that read were told
    valid           valid requests that were answered in the meantime, and how soon, in ms
    rss_mib         memory of the ingress before, after half of the frames and all, and at its
                    highest: what grows in the second half as in the first is a leak

A service that dies or logs an error is an error, as is whatever is left behind.
"""

from __future__ import annotations

import json
import secrets
import statistics
import sys
import time
from typing import Any

import click
import psutil
from tqdm import tqdm

from benchmarks.support.help import help_of
from benchmarks.support.pipeline import Pipeline
from tests.hostile import Hostile
from tests.pipeline.leftovers import wait_until_nothing_is_left
from tests.pipeline.wire import Wire

# What tests attack as well. Few and short sequences: a mutated request may still be a good one.
FUZZED = ("--device", "sim", "--sim-step-ms", "1", "--max-num-seqs", "64", "--max-model-len", "256")
CLIENTS = 3
VALID: dict[str, Any] = {"prompt_token_ids": [7, 8], "sampling": {"max_tokens": 16, "seed": 3}}
# A thread that generates frames keeps the one that takes the time of answers waiting so long.
SWITCH_INTERVAL_S = 0.0005


@click.command(help=help_of(__doc__))
@click.option("--frames", type=click.IntRange(CLIENTS), default=1_000_000, show_default=True)
@click.option("--seed", type=int, help="Of all that is sent; drawn, and printed, if not given.")
def main(frames: int, seed: int | None) -> None:
    seed = secrets.randbits(32) if seed is None else seed
    click.echo(f"--seed {seed}", err=True)
    click.echo(json.dumps({"seed": seed, **fuzz(frames, seed, show_progress=True)}))


def fuzz(frames: int, seed: int, *, show_progress: bool = False) -> dict[str, Any]:
    """Attacks a pipeline of its own with so many frames; the figures, as in the module's text.

    Raises:
        ValueError: a valid request brought something else than undisturbed, or a bad one was
            answered by something else than its error.
        RuntimeError: a service died, or logged an error of its own.
        TimeoutError: something was not answered, or something is left behind.
    """
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        with Pipeline("", *FUZZED) as pipeline:
            return _fuzz(pipeline, frames, seed, show_progress)
    finally:
        sys.setswitchinterval(switch_interval)


def _fuzz(pipeline: Pipeline, frames: int, seed: int, show_progress: bool) -> dict[str, Any]:
    before = [(service.pid, service.restarts) for service in pipeline.status().services]
    ingress = next(s.pid for s in pipeline.status().services if s.role == "ingress")
    memory = psutil.Process(ingress).memory_info
    shares = [frames // CLIENTS + (number < frames % CLIENTS) for number in range(CLIENTS)]
    hostile = [
        Hostile(pipeline.endpoint, seed + number, share, reads=number > 0)
        for number, share in enumerate(shares)
    ]
    with Wire(pipeline.endpoint) as good, tqdm(total=frames, disable=not show_progress) as bar:
        # A tokenizer imports what renders chats with the first one, which takes a second or two.
        good.results(good.ask(messages=[{"role": "user", "content": "x"}]))
        expected = _answer(good)
        undisturbed_s = statistics.median(_timed(good, expected) for _ in range(20))
        rss = dict.fromkeys(("before", "halfway", "after", "peak"), memory().rss)
        start = time.monotonic()
        for client in hostile:
            client.start()
        latencies_s: list[float] = []
        while any(client.is_alive() for client in hostile):
            latencies_s.append(_timed(good, expected))
            rss["peak"] = max(rss["peak"], memory().rss)
            bar.update(sum(client.sent for client in hostile) - bar.n)
            if bar.n < frames // 2:
                rss["halfway"] = memory().rss
        seconds = time.monotonic() - start
        bar.update(frames - bar.n)
        for client in hostile:
            client.check()
        if good.refused:
            raise ValueError(f"the good client was told {good.refused}")
    wait_until_nothing_is_left(pipeline)
    wrong = [line for line in pipeline.output if "Traceback" in line or "ERROR" in line]
    if wrong:
        raise RuntimeError(f"a service has logged {wrong[0]}")
    after = [(service.pid, service.restarts) for service in pipeline.status().services]
    if after != before:
        raise RuntimeError(f"services died: before {before}, after {after}")
    rss["after"] = memory().rss
    sent = sum(client.sent for client in hostile)
    times_ms = sorted(seconds * 1000 for seconds in latencies_s)
    return {
        "frames": sent,
        "seconds": round(seconds, 1),
        "frames_per_s": round(sent / seconds),
        "errors": sum(client.errors for client in hostile),
        "valid": {
            "answered": len(times_ms),
            "undisturbed_ms": round(undisturbed_s * 1000, 1),
            "median_ms": round(statistics.median(times_ms), 1),
            "p99_ms": round(times_ms[int(len(times_ms) * 0.99)], 1),
            "max_ms": round(times_ms[-1], 1),
        },
        "rss_mib": {when: round(size / 2**20, 1) for when, size in rss.items()},
    }


def _answer(good: Wire) -> tuple[list[int], str]:
    answer = good.ask(**VALID)
    good.results(answer)
    return answer.token_ids, answer.text


def _timed(good: Wire, expected: tuple[list[int], str]) -> float:
    """Seconds that the valid request takes. Raises ValueError if it brings something else."""
    start = time.monotonic()
    if (got := _answer(good)) != expected:
        raise ValueError(f"a valid request brought {got} instead of {expected}")
    return time.monotonic() - start


if __name__ == "__main__":
    main()
