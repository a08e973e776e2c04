"""A pipeline of a benchmark's own, and what its services say of themselves."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

from nanovllm import Client
from nanovllm.client.control import NEXT_REPORT_S, Control
from nanovllm.client.private_pipeline import PrivatePipeline
from nanovllm.control import SchedulerStats, Stats, WorkerStats
from nanovllm.settings import Settings

READY_TIMEOUT_S = 120.0

S = TypeVar("S", bound=Stats)


class Reported(NamedTuple):
    """The latest reports of the scheduler and of rank 0, and when rank 0's was made, in seconds."""

    at_s: float
    worker: WorkerStats
    scheduler: SchedulerStats


class Pipeline:
    """Launches, and returns when requests can start.

    Attributes:
        endpoint: where it serves.
        start_s: seconds from the launch until then.
    """

    def __init__(self, settings: Settings) -> None:
        started = time.monotonic()
        self._pipeline = PrivatePipeline(settings)
        self.endpoint = self._pipeline.endpoint
        try:
            with Client(self.endpoint, timeout=READY_TIMEOUT_S) as client:
                self._pipeline.wait_until_ready(client)
            self._control = Control(self._pipeline.runtime_dir)
        except BaseException:
            self._pipeline.close()
            raise
        self.start_s = time.monotonic() - started

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()
        self._pipeline.close()

    def reported(self) -> Reported:
        """What was reported last, up to a second ago.

        Raises RuntimeError if one of the two has not reported yet.
        """
        services = self._control.status().services
        worker = next(entry for entry in services if entry.role == "gpu_worker")
        scheduler = next(entry for entry in services if entry.role == "scheduler")
        return Reported(
            worker.at_s, _of(WorkerStats, worker.stats), _of(SchedulerStats, scheduler.stats)
        )

    @contextlib.contextmanager
    def watched(self, reports: list[Reported]) -> Iterator[None]:
        """Meanwhile, `reports` grows by one a second."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(NEXT_REPORT_S):
                reports.append(self.reported())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def settled(self) -> Reported:
        """Reports made from now on."""
        time.sleep(NEXT_REPORT_S)
        return self.reported()


def _of(kind: type[S], stats: Stats | None) -> S:
    if not isinstance(stats, kind):
        raise RuntimeError("a service has not reported yet")
    return stats
