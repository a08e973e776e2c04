"""What the loop knows of a device: it launches plans, and hears of what became of them."""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from typing import NamedTuple, Protocol

from nanovllm.control import LoadingStage
from nanovllm.messages import StepPlan, StepResult


class Progress(NamedTuple):
    """Loading, see `control.Loading`."""

    stage: LoadingStage
    done: int
    total: int


class Listening(NamedTuple):
    """Rank 0 awaits the other ranks at this port of the loopback interface."""

    port: int


class Loaded(NamedTuple):
    """The runner takes plans from here on. `detail` is a few words for the log."""

    num_blocks: int
    detail: str


Report = Progress | Listening | Loaded | StepResult


class GroupBroken(RuntimeError):
    """A rank of this group is gone, and so the group is."""


class Runner(Protocol):
    """A device that executes step plans in order, beside the thread that launches them.

    Attributes:
        descriptor: readable when there are reports.
    """

    @property
    def descriptor(self) -> int: ...

    @property
    def slots_used(self) -> int: ...

    def join(self, port: int) -> None:
        """Tells a rank other than 0 where rank 0 listens."""

    def launch(self, plan: StepPlan) -> None:
        """Enqueues a step; never waits for the device. Call it after `Loaded`."""

    def reset(self) -> None:
        """Empties all slots, after the steps launched so far."""

    def reports(self) -> list[Report]:
        """What has happened since the last call, results in the order of their plans.

        Raises whatever ended one of the runner's threads.
        """


class Outbox:
    """Reports on their way from a runner's threads to the loop; wakes it through a pipe."""

    def __init__(self) -> None:
        self.descriptor, self._write_end = os.pipe()
        os.set_blocking(self.descriptor, False)
        os.set_blocking(self._write_end, False)
        self._reports: deque[Report | BaseException] = deque()

    def put(self, report: Report | BaseException) -> None:
        """Hands on a report, or the exception that ends a thread."""
        self._reports.append(report)
        with suppress(BlockingIOError):  # full: the loop will wake up anyway
            os.write(self._write_end, b"\0")

    def take(self) -> list[Report]:
        """All reports so far. Raises the exception that was put, if there is one."""
        # First the pipe, then the reports: one put in between costs a wake-up, and is not lost.
        with suppress(BlockingIOError):
            os.read(self.descriptor, 65536)
        taken: list[Report] = []
        while self._reports:
            report = self._reports.popleft()
            if isinstance(report, BaseException):
                raise report
            taken.append(report)
        return taken
