"""What a pipeline still holds, by its services' own counts."""

from __future__ import annotations

import time

from benchmarks.support.pipeline import Pipeline
from nanovllm.client.control import Control
from nanovllm.control import (
    DetokenizerStats,
    HttpStats,
    IngressStats,
    SchedulerStats,
    ServiceStatus,
    TokenizerStats,
    WorkerStats,
)

TIMEOUT_S = 60.0


def wait_until_nothing_is_left(pipeline: Pipeline) -> None:
    """Returns once every service, in a report made from now on, holds nothing any more.

    Raises:
        TimeoutError: some service goes on holding something; the message tells what.
    """
    start = time.monotonic()
    with Control(str(pipeline.runtime_dir)) as control:
        while True:
            services = control.status().services
            left = {str(s.service): held(s) for s in services if any(held(s).values())}
            if not left and all(service.at_s >= start for service in services):
                return
            if time.monotonic() - start > TIMEOUT_S:
                raise TimeoutError(f"left behind: {left}")
            time.sleep(0.05)  # between two looks; a report comes once a second


def held(service: ServiceStatus) -> dict[str, int]:
    """What the service holds for requests, by name."""
    match service.stats:
        case IngressStats(requests=requests):
            return {"requests": requests}
        case TokenizerStats(queued=queued):
            return {"queued": queued}
        case SchedulerStats() as stats:
            return {
                "running": stats.running,
                "waiting": stats.waiting,
                "records": stats.records,
                "blocks": stats.blocks_used,
            }
        case WorkerStats(slots_used=slots):
            return {"slots": slots}
        case DetokenizerStats(requests=requests):
            return {"requests": requests}
        case HttpStats(running=running):
            return {"running": running}
    return {}
