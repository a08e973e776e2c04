"""The interface between the loop and a device: plans go in, reports come out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from nanovllm.control import LoadingStage
from nanovllm.grammars import Matcher
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

    def launch(self, plan: StepPlan, matchers: Mapping[int, Matcher]) -> None:
        """Enqueues a step, without waiting for the device. Call this after `Loaded` only.

        Args:
            matchers: of the sequences that the plan admits and that have a grammar, by slot.
        """

    def reset(self) -> None:
        """Empties all slots, after the steps launched so far."""

    def reports(self) -> list[Report]:
        """All reports since the last call, results in the order of their plans.

        Raises the exception that ended one of the runner's threads, if one has ended.
        """
