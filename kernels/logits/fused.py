"""Logits processors in one Triton kernel, which reads and writes each logit once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.logits.processors import MOST_COUNTED, ProcessorState
from nanovllm.kernels.slots.ops import SETTLED
from nanovllm.token_sets import WORD_BITS

COLUMNS = 2048

_MOST_COUNTED = tl.constexpr(MOST_COUNTED)
_SETTLED = tl.constexpr(SETTLED)
_WORD_BITS = tl.constexpr(WORD_BITS)


def process(
    logits: Tensor, state: ProcessorState, slots: Tensor, positions: Tensor, first: int
) -> None:
    """As `processors.process`."""
    rows, shard = logits.shape
    if not rows:
        return
    _process[(rows, triton.cdiv(shard, COLUMNS))](
        logits,
        slots,
        positions,
        *state,
        first,
        shard,
        state.allowed.shape[1],
        COLUMNS=COLUMNS,
        enable_fp_fusion=False,
    )


def mask(logits: Tensor, rows: Tensor, masks: Tensor, positions: Tensor, first: int) -> Tensor:
    """As `processors.mask`."""
    count, shard = len(rows), logits.shape[1]
    masked = torch.empty((count, shard), dtype=logits.dtype, device=logits.device)
    if count:
        _mask[(count, triton.cdiv(shard, COLUMNS))](
            masked,
            logits,
            rows,
            masks,
            positions,
            first,
            shard,
            logits.stride(0),
            masks.stride(0),
            COLUMNS=COLUMNS,
        )
    return masked


@triton.jit(do_not_specialize=["first"])
def _mask(
    masked_ptr,
    logits_ptr,
    rows_ptr,
    masks_ptr,
    positions_ptr,
    first,
    shard,
    logits_stride,
    masks_stride,
    COLUMNS: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    settled = tl.load(positions_ptr + index) == _SETTLED
    inside = columns < tl.where(settled, 0, shard)
    tokens = first + columns
    words = tl.load(masks_ptr + index * masks_stride + tokens // _WORD_BITS, mask=inside, other=0)
    allowed = inside & (((words >> (tokens % _WORD_BITS)) & 1) != 0)
    row = tl.load(rows_ptr + index)
    # Logits of tokens that are not allowed are not read.
    logits = tl.load(logits_ptr + row * logits_stride + columns, mask=allowed, other=float("-inf"))
    tl.store(masked_ptr + index * shard + columns, logits, mask=inside)


@triton.jit(do_not_specialize=["first"])
def _process(
    logits_ptr,
    slots_ptr,
    positions_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    min_length_ptr,
    seen_ptr,
    allowed_ptr,
    held_off_ptr,
    first,
    shard,
    words,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < shard
    slot = tl.load(slots_ptr + row)
    pointers = logits_ptr + row * shard + columns
    logits = tl.load(pointers, mask=inside)
    seen = tl.load(seen_ptr + slot * shard + columns, mask=inside, other=0).to(tl.int32)

    repetition = tl.load(repetition_ptr + slot)
    penalized = tl.where(logits > 0, tl.div_rn(logits, repetition), logits * repetition)
    logits = tl.where(seen != 0, penalized, logits)
    count = seen & _MOST_COUNTED
    logits -= tl.load(frequency_ptr + slot) * count.to(tl.float32)
    logits -= tl.load(presence_ptr + slot) * (count > 0).to(tl.float32)

    tokens = first + columns
    word = slot * words + tokens // _WORD_BITS
    bit = tokens % _WORD_BITS
    allowed = (tl.load(allowed_ptr + word, mask=inside, other=0) >> bit) & 1
    held_off = (tl.load(held_off_ptr + word, mask=inside, other=0) >> bit) & 1
    early = tl.load(positions_ptr + row) < tl.load(min_length_ptr + slot)
    ruled_out = (allowed == 0) | (early & (held_off != 0))
    tl.store(pointers, tl.where(ruled_out, float("-inf"), logits), mask=inside)
