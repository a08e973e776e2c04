"""A step on its way: the plan in the making, the plan in flight, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanovllm.messages import Admission, StepPlan, pack
from nanovllm.services.scheduler.sequences import Sequence
from nanovllm.services.scheduler.slots import Indices, Ints


class Step(NamedTuple):
    """A plan, and the slots of its result's rows, each in the epoch of that time."""

    plan: StepPlan
    rows: Indices
    epochs: Ints


class Sampled(NamedTuple):
    """The tokens of a result whose sequences are still there, one array a column.

    Attributes:
        uids: int64 [n].
        attempts, offsets, token_ids: int32 [n]; a token's offset is its index in the output.
        detokenizers: int32 [n], the index of the one that has begun the sequence, or
            NO_DETOKENIZER.
        result_rows: int [n], where the tokens stood in the result.
    """

    uids: NDArray[np.int64]
    attempts: Ints
    offsets: Ints
    token_ids: Ints
    detokenizers: Ints
    result_rows: Indices


class Ended(NamedTuple):
    """A sequence that finished, and the index of the detokenizer that has begun it, or
    NO_DETOKENIZER."""

    sequence: Sequence
    detokenizer: int


@dataclass(slots=True)
class Draft:
    """A plan in the making. `sampling` are the slots of the chunks that sample."""

    number: int
    admit: list[Admission] = field(default_factory=list)
    append: list[tuple[int, int]] = field(default_factory=list)
    chunks: list[tuple[int, int, int]] = field(default_factory=list)
    sampling: list[int] = field(default_factory=list)

    def plan(self, release: list[int], decode: Indices) -> StepPlan:
        """The message, once all is in it."""
        return StepPlan(
            self.number,
            release=pack(release),
            admit=self.admit,
            append=pack(chain.from_iterable(self.append)),
            prefill=pack(chain.from_iterable(self.chunks)),
            decode=pack(decode.astype(np.int32)),
        )
