"""How long do streams pause when their engine dies, and another one goes on with them?

    python -m benchmarks.failover
    python -m benchmarks.failover --kills 6 --begun 10 --begun 300

For each kill new streams are spread over two engines, on a CPU. A second after each has had
`--begun` tokens, the worker group of one engine is killed; the next time the other's. Prints one
JSON line for each `--begun`, with what was found at each kill, in seconds:

    output_tokens   that a stream had had, on average
    moved           streams of the engine that was killed
    median, most    from the kill until these had their next token
    others_most     the longest pause of the other streams
    changed         streams whose tokens are not those that they have without a kill
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from itertools import pairwise
from typing import NamedTuple

import click
from tqdm import tqdm

from benchmarks.decode import random_prompts
from benchmarks.support.help import help_of
from benchmarks.support.load import empty_load, run_for, run_until, send
from benchmarks.support.pipeline import LOOK_AGAIN_S, READY_TIMEOUT_S, Pipeline
from nanovllm.bench.client import SocketClient
from nanovllm.bench.load import Record
from nanovllm.client.control import NEXT_REPORT_S
from nanovllm.control import SchedulerStats
from nanovllm.launch.groups import STABLE_S
from nanovllm.names import ServiceId
from nanovllm.protocol import Delta, Generate, Sampling, ServerMessage

ENGINES = 2
# Beside those that all have had before the kill: so many that no stream ends before all go on.
MORE_TOKENS = 500
# What was sent before a kill has come so soon after it.
ON_THE_WAY_S = 0.5


@click.command(help=help_of(__doc__))
@click.option("--streams", default=64, show_default=True)
@click.option("--input", "prompt_tokens", default=32, show_default=True, help="Prompt tokens.")
@click.option("--begun", "all_begun", type=int, multiple=True, default=(10,), show_default=True)
@click.option("--kills", default=6, show_default=True, help="For each --begun.")
def main(streams: int, prompt_tokens: int, all_begun: tuple[int, ...], kills: int) -> None:
    prompts = random_prompts(streams, prompt_tokens)
    arguments = f"--device cpu --engines {ENGINES} --log-level warning"
    with Pipeline("", *arguments.split()) as pipeline:
        for begun in all_begun:
            sampling = Sampling(temperature=0, ignore_eos=True, max_tokens=begun + MORE_TOKENS)
            expected = _undisturbed(pipeline, prompts, sampling)
            found = []
            for number in tqdm(range(kills), desc="kills", disable=None, leave=False):
                time.sleep(STABLE_S)
                victim = ServiceId("gpu_worker", 0, number % ENGINES)
                found.append(_kill(pipeline, victim, begun, prompts, sampling, expected))
                _wait_until_ready(pipeline)
            figures = {
                name: [round(value, 2) for value in values]
                for name, values in zip(Kill._fields, zip(*found, strict=True), strict=True)
            }
            click.echo(json.dumps({"streams": streams, "begun": begun, **figures}))


class Answers(SocketClient):
    """A client that keeps the tokens of all answers, in the order of the requests."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self._by_id: dict[str, list[int]] = {}

    @property
    def token_ids(self) -> list[list[int]]:
        return list(self._by_id.values())

    def submit(self, request: Generate) -> None:
        self._by_id[request.id] = []
        super().submit(request)

    def receive(self, until: float) -> list[ServerMessage]:
        messages = super().receive(until)
        for message in messages:
            if isinstance(message, Delta):
                self._by_id[message.id] += message.token_ids
        return messages


def _undisturbed(
    pipeline: Pipeline, prompts: list[list[int]], sampling: Sampling
) -> list[list[int]]:
    """The tokens of each stream."""
    load = empty_load()
    with Answers(pipeline.endpoint) as client:
        send(load, client, prompts, sampling)
        run_until(load, client, lambda: not load.running)
    return client.token_ids


class Kill(NamedTuple):
    """What was found at one kill, see the module."""

    output_tokens: int
    moved: int
    median: float
    most: float
    others_most: float
    changed: int


def _kill(
    pipeline: Pipeline,
    victim: ServiceId,
    begun: int,
    prompts: list[list[int]],
    sampling: Sampling,
    expected: list[list[int]],
) -> Kill:
    """Kills `victim` while all streams run."""
    load = empty_load()
    with Answers(pipeline.endpoint) as client:
        records = send(load, client, prompts, sampling)
        run_until(load, client, lambda: all(len(r.arrived_s) >= begun for r in records))
        run_for(load, client, NEXT_REPORT_S)
        services = {service.service: service for service in pipeline.status().services}
        scheduler = services[ServiceId("scheduler", 0, victim.engine)].stats
        assert isinstance(scheduler, SchedulerStats)
        output = sum(len(record.arrived_s) for record in records) // len(records)
        killed_s = time.monotonic() - load.begins_at
        os.kill(services[victim].pid, signal.SIGKILL)
        run_until(load, client, lambda: not load.running)
    pauses = sorted((_longest_pause(record, killed_s) for record in records), reverse=True)
    ends = [pause.ended for pause in pauses[: scheduler.running]]
    return Kill(
        output_tokens=output,
        moved=scheduler.running,
        median=statistics.median(ends),
        most=max(ends),
        others_most=max((p.seconds for p in pauses[scheduler.running :]), default=0.0),
        changed=sum(x != y for x, y in zip(client.token_ids, expected, strict=True)),
    )


class Pause(NamedTuple):
    """Between two arrivals. `ended`: in seconds after the kill."""

    seconds: float
    ended: float


def _longest_pause(record: Record, killed_s: float) -> Pause:
    """Of those that began soon after the kill. What was on its way comes before the pause."""
    came = [0.0, *(at - killed_s for at in record.arrived_s if at > killed_s)]
    gaps = pairwise(came)
    return max(Pause(after - before, after) for before, after in gaps if before < ON_THE_WAY_S)


def _wait_until_ready(pipeline: Pipeline) -> None:
    """Raises TimeoutError if a service is not ready in time."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while any(service.state != "ready" for service in pipeline.status().services):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all are ready:\n{pipeline.transcript}")
        time.sleep(LOOK_AGAIN_S)


if __name__ == "__main__":
    main()
