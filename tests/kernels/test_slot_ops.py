"""The fused ops of a decode step's slots against the reference; on a CPU, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.sampling.reference import NOT_FINITE, SamplingTensors
from nanovllm.kernels.slots.fused import FusedSlotOps
from nanovllm.kernels.slots.ops import SlotOps, SlotState

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOTS = 9


def random_state(columns: int, block_size: int) -> SlotState:
    generator = torch.Generator().manual_seed(columns)

    def integers(high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator, dtype=dtype).to(DEVICE)

    def fractions() -> torch.Tensor:
        return torch.rand(SLOTS, generator=generator).to(DEVICE)

    return SlotState(
        block_tables=integers(1000, SLOTS, columns, dtype=torch.int32),
        num_tokens=1 + integers(columns * block_size, SLOTS),
        last_tokens=integers(500, SLOTS),
        sampling=SamplingTensors(
            temperature=fractions(),
            top_k=integers(50, SLOTS, dtype=torch.int32),
            top_p=fractions(),
            min_p=fractions(),
            seed=integers(2**40, SLOTS),
        ),
    )


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
        fused.num_tokens[padding_slot] = plain.num_tokens[padding_slot] = 1
        drawn = torch.arange(100, 100 + len(slots), device=DEVICE)
        drawn[0] = NOT_FINITE
        assert FusedSlotOps().advance(fused, rows, drawn).tolist() == drawn.tolist()
        assert SlotOps().advance(plain, rows, drawn).tolist() == drawn.tolist()
        used = [slot for slot in range(SLOTS) if slot != padding_slot]
        assert fused.num_tokens.tolist() == plain.num_tokens.tolist()
        assert fused.last_tokens[slots[0]] == 0, "an id that the embedding has"
        assert fused.last_tokens[used].tolist() == plain.last_tokens[used].tolist()
