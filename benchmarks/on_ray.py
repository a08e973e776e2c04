"""Does Ray cost anything? Tokens a second on a simulated device, on a Ray cluster and without.

    python -m benchmarks.on_ray
    python -m benchmarks.on_ray --engines 4 --sequences 64 --step-ms 20

Prints one JSON line for each number of engines, with the median of the rounds and all of them:

    ray                tokens a second on a cluster of one local node, where engines join by TCP
                       with keys
    without            of the same engines under one launcher
    of_without         the ratio of the medians
"""

from __future__ import annotations

import json
import statistics

import click

from benchmarks.feed import Case, arguments, measured
from benchmarks.support.help import help_of
from benchmarks.support.on_ray import on_ray
from benchmarks.support.pipeline import Pipeline
from nanovllm.bench.client import SocketClient
from nanovllm.control import Status

DEPTH = 3
PORT = 5690


@click.command(help=help_of(__doc__))
@click.option("--engines", "counts", type=int, multiple=True, default=(1, 2, 4), show_default=True)
@click.option("--sequences", default=64, show_default=True, help="Of an engine, at a time.")
@click.option("--step-ms", default=20.0, show_default=True)
@click.option("--seconds", default=12.0, show_default=True, help="Length of each measurement.")
@click.option("--rounds", default=3, show_default=True, help="Measurements of each kind, in turns.")
def main(
    counts: tuple[int, ...], sequences: int, step_ms: float, seconds: float, rounds: int
) -> None:
    case = Case(sequences, step_ms)
    for engines in counts:
        without, ray = [], []
        for _ in range(rounds):
            without.append(_without(case, engines, seconds))
            ray.append(_on_ray(case, engines, seconds))
        ratio = statistics.median(ray) / statistics.median(without)
        figures = {
            "ray": [statistics.median(ray), ray],
            "without": [statistics.median(without), without],
            "of_without": round(ratio, 4),
        }
        click.echo(json.dumps({"engines": engines, **case._asdict(), **figures}))


def _without(case: Case, engines: int, seconds: float) -> int:
    with (
        Pipeline("", *arguments(case, DEPTH), "--engines", str(engines)) as pipeline,
        SocketClient(pipeline.endpoint) as client,
    ):
        return int(measured(case, seconds, engines, pipeline.status, client)["tokens_per_s"])


def _on_ray(case: Case, engines: int, seconds: float) -> int:
    with on_ray((1 + engines,)) as running:
        words = ("--engines", str(engines), "--port", str(PORT), "--http", "")
        running.command("up", *arguments(case, DEPTH), *words)

        def status() -> Status:
            head, _ = running.cluster.state()
            if head is None or head.status is None:
                raise RuntimeError("the head does not answer")
            return head.status

        with SocketClient(status().endpoint) as client:
            figures = measured(case, seconds, engines, status, client)
        running.command("down")
        return int(figures["tokens_per_s"])


if __name__ == "__main__":
    main()
