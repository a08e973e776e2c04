"""Does it stand whatever bytes come? A million malformed frames against a running ingress.

    python -m benchmarks.fuzz --frames 1000000

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
    restarts        of services: any is an error, as is whatever is left behind
"""

from __future__ import annotations

import json
import secrets
import statistics
import sys
import time
from typing import Any, NamedTuple

import click
import psutil
from tqdm import tqdm

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


class Figures(NamedTuple):
    """What happened. Memory is the ingress's resident set, in bytes; latencies in seconds."""

    frames: int
    seconds: float
    errors: int
    latencies_s: list[float]
    undisturbed_s: float
    rss_before: int
    rss_halfway: int
    rss_after: int
    rss_peak: int
    restarts: int

    @property
    def valid(self) -> int:
        return len(self.latencies_s)


@click.command(help=__doc__)
@click.option("--frames", type=click.IntRange(CLIENTS), default=1_000_000, show_default=True)
@click.option("--seed", type=int, help="Of all that is sent; drawn, and printed, if not given.")
def main(frames: int, seed: int | None) -> None:
    seed = secrets.randbits(32) if seed is None else seed
    click.echo(f"--seed {seed}", err=True)
    figures = fuzz(frames, seed, show_progress=True)
    latencies_ms = sorted(latency * 1000 for latency in figures.latencies_s)
    valid = {
        "answered": figures.valid,
        "undisturbed_ms": round(figures.undisturbed_s * 1000, 1),
        "median_ms": round(statistics.median(latencies_ms), 1),
        "p99_ms": round(latencies_ms[int(len(latencies_ms) * 0.99)], 1),
        "max_ms": round(latencies_ms[-1], 1),
    }
    rss = {
        "before": figures.rss_before,
        "halfway": figures.rss_halfway,
        "after": figures.rss_after,
        "peak": figures.rss_peak,
    }
    line = {
        "seed": seed,
        "frames": figures.frames,
        "seconds": round(figures.seconds, 1),
        "frames_per_s": round(figures.frames / figures.seconds),
        "errors": figures.errors,
        "valid": valid,
        "rss_mib": {when: round(size / 2**20, 1) for when, size in rss.items()},
        "restarts": figures.restarts,
    }
    click.echo(json.dumps(line))


def fuzz(frames: int, seed: int, *, show_progress: bool = False) -> Figures:
    """Attacks a pipeline of its own with so many frames.

    Raises:
        ValueError: a valid request brought something else than undisturbed, or a bad one was
            answered by something else than its error.
        RuntimeError: a service logged an error of its own.
        TimeoutError: something was not answered, or something is left behind.
    """
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        with Pipeline("", *FUZZED) as pipeline:
            return _fuzz(pipeline, frames, seed, show_progress)
    finally:
        sys.setswitchinterval(switch_interval)


def _fuzz(pipeline: Pipeline, frames: int, seed: int, show_progress: bool) -> Figures:
    pids = [service.pid for service in pipeline.status().services]
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
        rss_before = rss_peak = rss_halfway = memory().rss
        start = time.monotonic()
        for client in hostile:
            client.start()
        latencies_s: list[float] = []
        while any(client.is_alive() for client in hostile):
            latencies_s.append(_timed(good, expected))
            rss_peak = max(rss_peak, memory().rss)
            bar.update(sum(client.sent for client in hostile) - bar.n)
            if bar.n < frames // 2:
                rss_halfway = memory().rss
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
    status = pipeline.status().services
    died = sum(now.pid != pid for now, pid in zip(status, pids, strict=True))
    return Figures(
        frames=sum(client.sent for client in hostile),
        seconds=seconds,
        errors=sum(client.errors for client in hostile),
        latencies_s=latencies_s,
        undisturbed_s=undisturbed_s,
        rss_before=rss_before,
        rss_halfway=rss_halfway,
        rss_after=memory().rss,
        rss_peak=rss_peak,
        restarts=died + sum(service.restarts for service in status),
    )


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
