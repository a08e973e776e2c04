"""Loads of `nanovllm bench`, run for a while at a time, of which no request may fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import click

from nanovllm.bench.arrivals import Trace
from nanovllm.bench.client import LoadClient
from nanovllm.bench.load import Load, Record
from nanovllm.bench.prompts import Turn
from nanovllm.bench.run import drive
from nanovllm.protocol import Sampling

# A load that gets no token for so long has been forgotten.
SILENCE_S = 60.0


def empty_load() -> Load:
    """A load of what `send` sends alone."""
    return Load(Trace([], 0.0), [], time.monotonic())


def send(
    load: Load, client: LoadClient, prompts: Iterable[list[int]], sampling: Sampling
) -> list[Record]:
    """Sends a request for each prompt at once; returns their records."""
    first = len(load.records)
    for prompt in prompts:
        client.submit(load.add([Turn(prompt, sampling)], time.monotonic()))
    return load.records[first:]


def run_until(load: Load, client: LoadClient, reached: Callable[[], bool]) -> None:
    """Carries the load until `reached()`.

    Raises RuntimeError when a request has failed, or nothing comes any more; ClickException when
    there is nothing to wait for.
    """
    tokens, heard_at = load.tokens, time.monotonic()

    def ends() -> bool:
        nonlocal tokens, heard_at
        if load.tokens != tokens:
            tokens, heard_at = load.tokens, time.monotonic()
        elif time.monotonic() > heard_at + SILENCE_S:
            raise RuntimeError(f"no token for {SILENCE_S:g} s")
        return reached()

    drive(load, client, until=ends)
    for record in load.records:
        if record.error is not None:
            raise RuntimeError(f"{record.error}: {record.message}")
    if not reached():
        raise click.ClickException("all answers ended before they were measured")


def run_for(load: Load, client: LoadClient, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    run_until(load, client, lambda: time.monotonic() >= deadline)
