"""The host's mirror of the slots, against a model that keeps every sequence as a list."""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.kernels.sampling import SHORTLIST_SIZE
from nanovllm.messages import Admission, StepPlan, unpack
from nanovllm.protocol import Sampling
from nanovllm.services.gpu_worker.slots import NO_LOGPROBS, Batch, SlotTable
from tests.gpu_worker.plans import GREEDY, Request, random_schedule, step_plan

SLOTS = 5
BLOCK_SIZE = 4
SAMPLED = -1  # a token that only the device knows


class Row(NamedTuple):
    slot: int
    tokens: list[int]
    positions: list[int]
    context: int
    sampled_position: int | None


class NaiveSlot:
    def __init__(self, admission: Admission) -> None:
        self.tokens = unpack(admission.tokens).tolist()
        self.blocks: list[int] = unpack(admission.blocks).tolist()
        self.sampling = admission.sampling


class NaiveSlots:
    def __init__(self) -> None:
        self.slots: dict[int, NaiveSlot] = {}

    def apply(self, plan: StepPlan) -> list[Row]:
        for slot in unpack(plan.release).tolist():
            del self.slots[slot]
        for admission in plan.admit:
            self.slots[admission.slot] = NaiveSlot(admission)
        for slot, block in unpack(plan.append).reshape(-1, 2).tolist():
            self.slots[slot].blocks.append(block)
        rows = []
        spans = [(slot, len(self.slots[slot].tokens) - 1, 1) for slot in unpack(plan.decode)]
        for slot, start, length in spans + unpack(plan.prefill).reshape(-1, 3).tolist():
            tokens, end = self.slots[slot].tokens, start + length
            samples = end == len(tokens)
            rows.append(
                Row(
                    slot,
                    list(tokens[start:end]),
                    list(range(start, end)),
                    end,
                    end if samples else None,
                )
            )
        for row in rows:
            if row.sampled_position is not None:
                self.slots[row.slot].tokens.append(SAMPLED)
        return rows


def rows_of(batch: Batch) -> list[Row]:
    """A batch, row by row. What a decode's token is, the host cannot know."""
    slots = np.concatenate((batch.decode_slots, batch.chunk_slots)).tolist()
    sampled = dict(zip(batch.sampling_rows.tolist(), batch.sampled_positions.tolist(), strict=True))
    assert [slots[row] for row in batch.sampling_rows] == batch.sampling_slots.tolist()
    tokens, positions = batch.chunk_tokens.tolist(), batch.chunk_positions.tolist()
    rows = []
    for row, (slot, length, context) in enumerate(
        zip(slots, batch.query_lens.tolist(), batch.context_lens.tolist(), strict=True)
    ):
        if row < len(batch.decode_slots):
            found = Row(slot, [SAMPLED], [context - 1], context, sampled.get(row))
        else:
            found = Row(slot, tokens[:length], positions[:length], context, sampled.get(row))
            tokens, positions = tokens[length:], positions[length:]
        rows.append(found)
    assert not tokens
    assert not positions
    return rows


def needs_whole_logits(sampling: Sampling) -> bool:
    """Whether neither the best token nor SHORTLIST_SIZE likeliest ones are all that it may draw."""
    plain = sampling.top_p == 1 and sampling.top_k == 0 and sampling.min_p == 0
    return not (sampling.temperature == 0 or plain or 0 < sampling.top_k <= SHORTLIST_SIZE)


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7]),
    top_p=st.sampled_from([0.5, 1.0]),
    top_k=st.sampled_from([0, 3, SHORTLIST_SIZE, SHORTLIST_SIZE + 1]),
    min_p=st.sampled_from([0.0, 0.1]),
    seed=st.integers(-(2**63), 2**63 - 1),
    logprobs=st.none() | st.integers(0, 20),
)
requests = st.builds(
    Request,
    prompt=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20),
    max_tokens=st.integers(1, 8),
    sampling=samplings,
)


@settings(max_examples=150)
@given(st.lists(requests, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_equals_the_naive_model(asked: list[Request], rng: random.Random) -> None:
    schedule = random_schedule(
        asked, rng, slots=SLOTS, blocks=40, block_size=BLOCK_SIZE, largest_chunk=6
    )
    table, naive = SlotTable(SLOTS), NaiveSlots()
    block_tables: dict[tuple[int, int], int] = {}
    for plan, _ in schedule:
        batch, expected = table.apply(plan), naive.apply(plan)
        assert rows_of(batch) == expected
        assert table.used == len(naive.slots)
        for slot, column, block in batch.block_updates.tolist():
            block_tables[slot, column] = block
        for slot, held in naive.slots.items():
            written = [block_tables[slot, column] for column in range(len(held.blocks))]
            assert written == held.blocks
        sampling = [
            naive.slots[row.slot].sampling for row in expected if row.sampled_position is not None
        ]
        assert batch.logprobs.tolist() == [
            NO_LOGPROBS if one.logprobs is None else one.logprobs for one in sampling
        ]
        assert batch.whole_rows.tolist() == [
            row for row, one in enumerate(sampling) if needs_whole_logits(one)
        ]


def test_a_slot_is_released_and_taken_in_one_plan() -> None:
    table = SlotTable(2)
    first = Admission(1, b"\1\0\0\0" * 5, 5, b"\7\0\0\0\x08\0\0\0", 0, GREEDY)
    table.apply(step_plan(0, admit=[first], prefill=[(1, 0, 3)]))
    second = Admission(1, b"\2\0\0\0" * 2, 2, b"\x09\0\0\0", 0, GREEDY)
    batch = table.apply(
        step_plan(1, release=[1], admit=[second], append=[(1, 3), (1, 4)], prefill=[(1, 1, 1)])
    )
    assert table.used == 1
    assert batch.chunk_tokens.tolist() == [2]
    assert batch.block_updates.tolist() == [[1, 0, 9], [1, 1, 3], [1, 2, 4]]
    assert batch.sampled_positions.tolist() == [2]


def test_a_reset_empties_all_slots() -> None:
    table = SlotTable(2)
    table.apply(step_plan(0, admit=[Admission(0, b"\1\0\0\0", 1, b"", 0, GREEDY)]))
    table.reset()
    assert table.used == 0
    batch = table.apply(
        step_plan(1, admit=[Admission(0, b"\3\0\0\0" * 2, 2, b"", 0, GREEDY)], prefill=[(0, 0, 2)])
    )
    assert batch.chunk_tokens.tolist() == [3, 3]
    assert batch.sampled_positions.tolist() == [2]


def test_a_slot_that_does_not_exist() -> None:
    with pytest.raises(IndexError):
        SlotTable(2).apply(step_plan(0, decode=[2]))
