"""Logits processors: the reference against transformers' own, the kernel against the reference (on
a CPU in Triton's interpreter)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from nanovllm.kernels.logits import fused, processors
from nanovllm.kernels.logits.processors import (
    IN_PROMPT,
    MOST_COUNTED,
    NO_COLUMN,
    NO_TOKEN,
    ProcessorState,
)
from nanovllm.kernels.slots.ops import SETTLED
from nanovllm.token_sets import WORD_BITS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOTS = 6


def bits(token_ids: list[int], vocab: int) -> Tensor:
    """A set of token ids as `ProcessorState` has it."""
    sets = torch.zeros(-(-vocab // WORD_BITS) * WORD_BITS, dtype=torch.int64)
    sets[token_ids] = 1
    shifted = sets.view(-1, WORD_BITS) << torch.arange(WORD_BITS)
    return shifted.sum(dim=-1).to(torch.int32)


def random_state(vocab: int, first: int, shard: int) -> ProcessorState:
    generator = torch.Generator().manual_seed(vocab + first)
    seen = torch.randint(-3, 3, (SLOTS, shard), generator=generator).clamp_min(0)
    seen[torch.rand(SLOTS, shard, generator=generator) < 0.2] |= IN_PROMPT
    seen[0, :3] = torch.tensor([MOST_COUNTED, MOST_COUNTED | IN_PROMPT, IN_PROMPT])
    random = torch.rand(SLOTS, vocab, generator=generator)
    # Slots with no bias, and with biases in any entries; bad words with beginnings of 1 and 2
    # tokens, of which the tail says some. Bad words end in columns that have a bias, too.
    columns = torch.stack([torch.randperm(shard, generator=generator)[:5] for _ in range(SLOTS)])
    columns[torch.rand(SLOTS, 5, generator=generator) < 0.3] = NO_COLUMN
    columns[1] = NO_COLUMN
    beginnings = torch.randint(0, 2, (SLOTS, 6, 3), generator=generator)
    beginnings[..., 0] = NO_TOKEN
    beginnings[:, ::2, 1] = NO_TOKEN
    lasts = torch.randint(-1, shard, (SLOTS, 6), generator=generator)
    lasts[:, :3] = columns[:, :3]
    state = ProcessorState(
        repetition=torch.tensor([1.0, 1.0, 1.0, 1.3, 0.7, 1.1]),
        frequency=torch.tensor([0.0, 0.5, 0.0, 0.0, -0.3, 0.7]),
        presence=torch.tensor([0.0, 0.0, 1.5, 0.0, 0.2, -2.0]),
        min_length=torch.tensor([0, 0, 9, 9, 9, 100]),
        seen=seen.to(torch.int16),
        allowed=torch.stack(
            [bits((row < 0.8).nonzero().flatten().tolist(), vocab) for row in random]
        ),
        held_off=torch.stack(
            [bits((row < 0.1).nonzero().flatten().tolist(), vocab) for row in random]
        ),
        bias_columns=columns.int(),
        bias=(torch.randn(SLOTS, 5, generator=generator) * 9).masked_fill(columns == NO_COLUMN, 0),
        beginnings=beginnings.int(),
        lasts=lasts.int(),
        tail=torch.randint(0, 2, (SLOTS, 3), generator=generator).int(),
    )
    return ProcessorState(*(tensor.to(DEVICE) for tensor in state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("vocab", "first", "shard"), [(100, 0, 100), (5000, 0, 5000), (4103, 2051, 2052)]
)
def test_the_kernels_equal_the_reference(
    vocab: int, first: int, shard: int, dtype: torch.dtype
) -> None:
    state = random_state(vocab, first, shard)
    # The rows of three sequences, of which one occurs twice, among those of others.
    rows = torch.tensor([7, 0, 1, 2, 2, 4, 5], device=DEVICE)
    slots = torch.tensor([5, 0, 1, 4, 4, 3, 2], device=DEVICE)
    positions = torch.tensor([99, 9, 9, 8, 8, 9, 3], device=DEVICE)
    logits = torch.randn(8, shard, generator=torch.Generator().manual_seed(1)) * 5
    logits[0, 5:7] = torch.tensor([torch.nan, -torch.inf])
    logits[1, :2] = 0
    logits = logits.to(DEVICE, dtype)
    given = logits.clone()
    found = fused.process(logits, rows, state, slots, positions, first)
    expected = processors.process(logits, rows, state, slots, positions, first)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(logits, given, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(expected[0].cpu(), logits[7].float().cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("first", "shard"), [(0, 5000), (2051, 2052), (0, 31)])
def test_masked_rows_have_the_logits_of_their_sets_alone(
    first: int, shard: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(first)
    logits = (torch.randn(4, shard, generator=generator) * 5).to(DEVICE, dtype)
    logits[2, 3] = torch.nan
    rows = torch.tensor([3, 0, 2], device=DEVICE)
    sets: list[list[int]] = [[first, first + shard - 1], [], list(range(0, first + shard, 3))]
    masks = torch.stack([bits(members, first + shard) for members in sets]).to(DEVICE)
    positions = torch.zeros_like(rows)
    expected = processors.mask(logits, rows, masks, positions, first)
    found = fused.mask(logits, rows, masks, positions, first)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    positions[1] = SETTLED
    found = fused.mask(logits, rows, masks, positions, first)[[0, 2]]
    torch.testing.assert_close(found, expected[[0, 2]], rtol=0, atol=0, equal_nan=True)
    for index, (row, members) in enumerate(zip(rows.tolist(), sets, strict=True)):
        own = [token - first for token in members if token >= first]
        others = torch.ones(shard, dtype=torch.bool)
        others[own] = False
        assert torch.isneginf(expected[index].cpu()[others]).all()
        assert torch.equal(expected[index, own].nan_to_num(7), logits[row, own].nan_to_num(7))


def test_equal_to_transformers() -> None:
    vocab, prompt, eos = 50, [3, 7, 7, 20], [1, 2]
    forbidden = [5, 9]
    output = [8, 8, 7]
    ids = torch.tensor([prompt + output])
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(2)) * 4
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.4),
            NoBadWordsLogitsProcessor([[token] for token in forbidden]),
            MinNewTokensLengthLogitsProcessor(len(prompt), 4, eos),
        ]
    )
    expected = theirs(ids, logits.clone())
    seen = torch.zeros(1, vocab, dtype=torch.int16)
    seen[0, prompt] = IN_PROMPT
    for token in output:
        seen[0, token] += 1
    state = ProcessorState(
        repetition=torch.tensor([1.4]),
        frequency=torch.zeros(1),
        presence=torch.zeros(1),
        min_length=torch.tensor([len(prompt) + 4]),
        seen=seen,
        allowed=bits([t for t in range(vocab) if t not in forbidden], vocab)[None],
        held_off=bits(eos, vocab)[None],
        bias_columns=torch.full((1, 1), NO_COLUMN, dtype=torch.int32),
        bias=torch.zeros(1, 1),
        beginnings=torch.full((1, 1, 1), NO_TOKEN, dtype=torch.int32),
        lasts=torch.full((1, 1), NO_COLUMN, dtype=torch.int32),
        tail=torch.full((1, 1), NO_TOKEN, dtype=torch.int32),
    )
    slot = torch.tensor([0])

    def processed(state: ProcessorState, position: int) -> Tensor:
        return processors.process(logits, slot, state, slot, torch.tensor([position]), 0)

    torch.testing.assert_close(processed(state, len(ids[0])), expected, rtol=0, atol=0)
    state = state._replace(
        repetition=torch.ones(1), frequency=torch.tensor([0.5]), presence=torch.tensor([0.25])
    )
    counted = processed(state, 99)
    difference = (logits - counted)[0]
    assert difference[[8, 7, 3, 4]].tolist() == pytest.approx([1.25, 0.75, 0, 0], abs=1e-6)
    assert counted[0, eos].isfinite().all(), "long enough to end"
