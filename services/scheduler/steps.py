"""A step: its plan while it is drafted, its plan in flight, and the tokens that it sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanovllm.messages import Admission, RowLogprobs, StepPlan, TokenLogprobs, pack
from nanovllm.services.scheduler.sequences import Sequence
from nanovllm.services.scheduler.slots import Indices, Ints


class Step(NamedTuple):
    """A plan in flight, and for each row of its result the slot, and the slot's epoch."""

    plan: StepPlan
    rows: Indices
    epochs: Ints
    # Whose prompts' log-probabilities the result has, in this order.
    prompts: list[Sequence]


class Sampled(NamedTuple):
    """The tokens of a result, without those of sequences that have left their slots. One array a
    column."""

    uids: NDArray[np.int64]
    attempts: Ints
    offsets: Ints  # the token's index in the output
    token_ids: Ints
    detokenizers: Ints  # the index of the detokenizer that has begun the sequence, or none
    result_rows: Indices  # the token's row in the result


def logprobs_of(rows: Indices, logprobs: list[RowLogprobs]) -> list[tuple[int, TokenLogprobs]]:
    """The `logprobs` of these rows of a result, each with the index of its row in `rows`, which
    ascend."""
    places = rows.searchsorted([entry.row for entry in logprobs]).tolist()
    return [
        (i, entry.logprobs)
        for i, entry in zip(places, logprobs, strict=True)
        if i < len(rows) and rows[i] == entry.row
    ]


class Ended(NamedTuple):
    """A sequence that finished."""

    sequence: Sequence
    detokenizer: int  # the index of the detokenizer that has begun the sequence, or NO_DETOKENIZER


@dataclass(slots=True)
class Draft:
    """A plan that is not complete."""

    number: int
    admit: list[Admission] = field(default_factory=list)
    append: list[tuple[int, int]] = field(default_factory=list)  # slot, block
    chunks: list[tuple[int, int, int]] = field(default_factory=list)  # slot, start, length
    sampling: list[int] = field(default_factory=list)  # the slots of the chunks that sample
    prompts: list[Sequence] = field(default_factory=list)  # see `Step`

    def plan(self, release: list[int], decode: Indices) -> StepPlan:
        """The complete plan as a message."""
        return StepPlan(
            self.number,
            release=pack(release),
            admit=self.admit,
            append=pack(chain.from_iterable(self.append)),
            prefill=pack(chain.from_iterable(self.chunks)),
            decode=pack(decode.astype(np.int32)),
        )
