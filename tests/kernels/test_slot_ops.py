"""The fused ops of a decode step's slots against the reference; on a CPU, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.logits import processors
from nanovllm.kernels.sampling import reference
from nanovllm.kernels.sampling.reference import NOT_FINITE, SamplingTensors
from nanovllm.kernels.slots.fused import FusedSlotOps
from nanovllm.kernels.slots.ops import SETTLED, SlotOps, SlotState
from nanovllm.messages import NO_TOKEN_LEFT
from nanovllm.token_sets import token_set

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOTS = 9


def random_state(columns: int, block_size: int, slots: int = SLOTS) -> SlotState:
    generator = torch.Generator().manual_seed(columns)

    def integers(high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator, dtype=dtype).to(DEVICE)

    def fractions() -> torch.Tensor:
        return torch.rand(slots, generator=generator).to(DEVICE)

    return SlotState(
        block_tables=integers(1000, slots, columns, dtype=torch.int32),
        num_tokens=1 + integers(columns * block_size, slots),
        last_tokens=integers(500, slots),
        sampling=SamplingTensors(
            temperature=fractions(),
            top_k=integers(50, slots, dtype=torch.int32),
            top_p=fractions(),
            min_p=fractions(),
            seed=integers(2**40, slots),
        ),
    )


@pytest.mark.parametrize("n", [0, 1, 127, 300])
def test_a_step_ends_with_a_token_more(n: int) -> None:
    found = []
    for ops in (SlotOps(), FusedSlotOps()):
        state = random_state(3, 16, slots=301)
        before = state.num_tokens.tolist()
        slots = torch.randperm(300, generator=torch.Generator().manual_seed(n))[:n].to(DEVICE)
        tokens = torch.arange(-1, n - 1, device=DEVICE)
        expected = tokens.tolist()
        host = ops.advance(state, slots, tokens)
        tokens.add_(1)  # the next step's
        if DEVICE.type == "cuda":
            assert host.is_pinned() or not n
            torch.cuda.current_stream().synchronize()
        assert (host.dtype, host.tolist()) == (torch.int32, expected)
        for slot in slots.tolist():
            before[slot] += 1
        assert state.num_tokens.tolist() == before
        assert not n or state.last_tokens[slots[0]] == 0, "an id that the embedding has"
        found.append(state.last_tokens.tolist())
    assert found[0] == found[1]


@pytest.mark.parametrize(("columns", "block_size"), [(1, 256), (3, 16), (16, 256), (21, 48)])
def test_equal_the_reference(columns: int, block_size: int) -> None:
    padding_slot = SLOTS - 1
    for slots in ([4], [0, 7, 2, 5], [3, 1, padding_slot, padding_slot]):
        fused, plain = (random_state(columns, block_size) for _ in range(2))
        rows = torch.tensor(slots, device=DEVICE)
        found = FusedSlotOps().gather(fused, rows, block_size)
        expected = SlotOps().gather(plain, rows, block_size)
        for one, other in zip(
            [*found[:-1], *found.sampling], [*expected[:-1], *expected.sampling], strict=True
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_draws_equal_the_reference() -> None:
    """Of rows with filters and without, at temperature 0 and above, whose token is in the mask, or
    not, or not finite."""
    fused, plain = (random_state(3, 16) for _ in range(2))
    for state in (fused, plain):
        off = [1, 2, 4, 5, 6, 8]
        state.sampling.top_k[off], state.sampling.top_p[off], state.sampling.min_p[off] = 0, 1, 0
        state.sampling.temperature[[2, 3]] = 0
    drawn = torch.tensor([[9, 0, 1, 2, 8, 4, 5, 6, 7], [8, 0, 1, 2, 3, 4, 5, 6, 7]], device=DEVICE)
    tokens = [40, 41, 42, 0, 39, NOT_FINITE, 70, 99, 38, 1]
    before = torch.tensor(tokens, device=DEVICE)
    masks = torch.from_numpy(token_set([0, *range(38, 45), 70], 4)).to(DEVICE).repeat(9, 1)
    masks[7] = 0
    redrawn = torch.tensor([7, 8, 9, 10, 11, 12] + [NOT_FINITE] * 3, device=DEVICE)
    for these in (masks, None):
        found = FusedSlotOps().gather_draw(fused, drawn, before, these)
        expected = SlotOps().gather_draw(plain, drawn, before, these)
        for one, other in zip(
            [found.positions, *found.sampling],
            [expected.positions, *expected.sampling],
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        settled = (expected.positions == SETTLED).nonzero()[:, 0].tolist()
        # The padding slot; a mask that lacks the token; at temperature 0; not finite; no mask.
        assert settled == ([] if these is None else [0, 2, 3, 4, 5])
        outs = [before.clone(), before.clone()]
        for ops, out in ((FusedSlotOps(), outs[0]), (SlotOps(), outs[1])):
            ops.replace(drawn[0], expected.positions, redrawn, out, NO_TOKEN_LEFT)
        assert outs[0].tolist() == outs[1].tolist()
        assert outs[0][5:8].tolist() == [NOT_FINITE, NO_TOKEN_LEFT, NO_TOKEN_LEFT]
        kept = drawn[0, settled].tolist()
        assert [outs[0][row] for row in kept] == [tokens[row] for row in kept]


def test_a_settled_row_keeps_the_token_that_masked_logits_give() -> None:
    generator = torch.Generator().manual_seed(7)
    count, vocab = SLOTS - 1, 200
    state = random_state(3, 16)
    drawn = torch.arange(count, device=DEVICE).repeat(2, 1)
    settled = 0
    for _ in range(20):
        state.num_tokens.add_(1)
        state.sampling.temperature[::3] = 0
        state.sampling.top_k[::2], state.sampling.top_p[::2], state.sampling.min_p[::2] = 0, 1, 0
        logits = (torch.randn(count, vocab, generator=generator) * 2).round().to(DEVICE)
        members = [torch.randperm(vocab, generator=generator)[:120].tolist() for _ in range(count)]
        masks = torch.stack([torch.from_numpy(token_set(ids, 7)) for ids in members]).to(DEVICE)
        positions, params = SlotOps().gather_draw(state, drawn, drawn[0])
        tokens = reference.sample(logits, params, positions)
        masked = processors.mask(logits, drawn[0], masks, positions, 0)
        expected = reference.sample(masked, params, positions)
        kept = SlotOps().gather_draw(state, drawn, tokens, masks).positions == SETTLED
        assert tokens[kept].tolist() == expected[kept].tolist()
        settled += int(kept.sum())
    assert 20 < settled < 20 * count
