"""The interface between the loop and a device: plans go in, reports come out."""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from typing import NamedTuple, Protocol

from nanovllm.control import LoadingStage
from nanovllm.messages import StepPlan, StepResult


class Progress(NamedTuple):
    """How far loading is, see `control.Loading`."""

    stage: LoadingStage
    done: int
    total: int


class Listening(NamedTuple):
    """Rank 0 awaits the other ranks at this port of the loopback interface."""

    port: int


class Loaded(NamedTuple):
    """The runner can take plans. `detail` is for the log."""

    num_blocks: int
    detail: str


Report = Progress | Listening | Loaded | StepResult


class GroupBroken(RuntimeError):
    """A rank of this tensor-parallel group is gone, so the group cannot go on."""


class Runner(Protocol):
    """A device that runs step plans in order, while the thread that launches them goes on."""

    @property
    def descriptor(self) -> int:
        """A file descriptor that is readable when there are reports."""

    @property
    def slots_used(self) -> int:
        """How many slots hold a sequence."""

    def join(self, port: int) -> None:
        """Tells a rank other than 0 where rank 0 listens."""

    def launch(self, plan: StepPlan) -> None:
        """Enqueues a step, without waiting for the device. Call this after `Loaded` only."""

    def reset(self) -> None:
        """Empties all slots, after the steps launched so far."""

    def reports(self) -> list[Report]:
        """All reports since the last call, results in the order of their plans.

        Raises the exception that ended one of the runner's threads, if one has ended.
        """


class ReportQueue:
    """Reports on their way from a runner's threads to the loop, which a pipe wakes up."""

    def __init__(self) -> None:
        self.descriptor, self._write_end = os.pipe()
        os.set_blocking(self.descriptor, False)
        os.set_blocking(self._write_end, False)
        self._reports: deque[Report | BaseException] = deque()

    def put(self, report: Report | BaseException) -> None:
        """Passes on a report, or the exception that ends a thread."""
        self._reports.append(report)
        with suppress(BlockingIOError):  # full, so the loop wakes up anyway
            os.write(self._write_end, b"\0")

    def take(self) -> list[Report]:
        """All reports so far. Raises the exception that was put, if there is one."""
        # The pipe first: a report put in between then costs a wake-up, but is not lost.
        with suppress(BlockingIOError):
            os.read(self.descriptor, 65536)
        taken: list[Report] = []
        while self._reports:
            report = self._reports.popleft()
            if isinstance(report, BaseException):
                raise report
            taken.append(report)
        return taken
