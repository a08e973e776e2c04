"""Is the device fed? The whole pipeline on a simulated device, under a steady load.

    python -m benchmarks.feed

Prints one JSON line for each load and pipeline depth:

    device_busy        share of the time for which the device had work
    client_received    tokens that reached the client, over those that the device made
    lag_ms             from the end of a step on the device to its token at the client
    scheduler_us       CPU time of the scheduler, a step
    plan_bytes         size of a steady step plan
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any, NamedTuple

import click

from benchmarks.support.closed_loop import ClosedLoop
from benchmarks.support.help import help_of
from benchmarks.support.pipeline import Pipeline
from nanovllm.control import IngressStats, SchedulerStats, Status, WorkerStats

OUTPUT_TOKENS = (50, 300)
WARM_UP_S = 4.0


class Load(NamedTuple):
    """How many sequences run at the same time, and how long a step takes on the device."""

    sequences: int
    step_ms: float


LOADS = (Load(256, 2.0), Load(1, 0.5))


@click.command(help=help_of(__doc__))
@click.option("--seconds", default=12.0, show_default=True, help="Length of each measurement.")
@click.option("--depth", "depths", type=int, multiple=True, default=(3, 1), show_default=True)
@click.option("--sequences", type=int, help="Only the load with so many sequences.")
def main(seconds: float, depths: tuple[int, ...], sequences: int | None) -> None:
    for load in LOADS:
        for depth in depths:
            if sequences in (None, load.sequences):
                click.echo(json.dumps(measure(load, depth, seconds)))


def measure(load: Load, depth: int, seconds: float) -> dict[str, Any]:
    """Runs a pipeline of its own under `load` for `seconds` after a warm-up."""
    arguments = f"--device sim --sim-step-ms {load.step_ms} --pipeline-depth {depth}"
    arguments += f" --max-num-seqs {load.sequences} --max-model-len 1024 --log-level warning"
    # A few more than run, so that whenever a sequence ends another is waiting.
    outstanding = load.sequences + max(1, load.sequences // 16)
    with Pipeline("", *arguments.split()) as pipeline:
        clients = ClosedLoop(
            pipeline.endpoint,
            outstanding,
            OUTPUT_TOKENS,
            probe_every=64 if load.sequences > 1 else 2,
        )
        clients.run_until(time.monotonic() + WARM_UP_S)
        clients.lags_s.clear()
        before = pipeline.status()
        # A report a second from each service, which says when it was made.
        clients.run_until(time.monotonic() + seconds + 1.0)
        after = pipeline.status()
        clients.run_until(time.monotonic() + 0.2)
        clients.close()
    return {
        "sequences": load.sequences,
        "step_ms": load.step_ms,
        "pipeline_depth": depth,
        **_figures(before, after, clients),
    }


def _figures(before: Status, after: Status, clients: ClosedLoop) -> dict[str, Any]:
    scheduler = _Pair(before, after, "scheduler")
    worker = _Pair(before, after, "gpu_worker")
    ingress = _Pair(before, after, "ingress")
    was, now = scheduler.was.stats, scheduler.now.stats
    first, last = ingress.was.stats, ingress.now.stats
    device_was, device_now = worker.was.stats, worker.now.stats
    if not (isinstance(was, SchedulerStats) and isinstance(now, SchedulerStats)):
        raise RuntimeError("the scheduler has not reported")
    if not (isinstance(device_was, WorkerStats) and isinstance(device_now, WorkerStats)):
        raise RuntimeError("the worker has not reported")
    if not (isinstance(first, IngressStats) and isinstance(last, IngressStats)):
        raise RuntimeError("the ingress has not reported")
    lags_ms = sorted(lag * 1000 for lag in clients.lags_s)
    produced = now.generated - was.generated
    received = clients.received_between(scheduler.was.at_s, scheduler.now.at_s)
    return {
        "seconds": round(scheduler.seconds, 2),
        "device_busy": round((device_now.busy_s - device_was.busy_s) / worker.seconds, 4),
        "client_received": round(received / produced, 4),
        "tokens_per_s": round(produced / scheduler.seconds),
        "requests_finished": clients.finished,
        "lag_ms": {
            "median": round(statistics.median(lags_ms), 2),
            "p99": round(lags_ms[int(len(lags_ms) * 0.99)], 2),
        },
        "scheduler_us": round(
            (scheduler.now.cpu_s - scheduler.was.cpu_s) / (now.steps - was.steps) * 1e6, 1
        ),
        "ingress_us_a_request": round(
            (ingress.now.cpu_s - ingress.was.cpu_s) / (last.finished - first.finished) * 1e6, 1
        ),
        "plan_bytes": now.plan_bytes,
        "cpu_share": {
            service.role: round(_Pair(before, after, service.role).cpu_share, 3)
            for service in after.services
        },
    }


class _Pair:
    """Two reports of the first service of a role."""

    def __init__(self, before: Status, after: Status, role: str) -> None:
        self.was = next(service for service in before.services if service.role == role)
        self.now = next(service for service in after.services if service.role == role)
        self.seconds = self.now.at_s - self.was.at_s

    @property
    def cpu_share(self) -> float:
        return (self.now.cpu_s - self.was.cpu_s) / self.seconds


if __name__ == "__main__":
    main()
