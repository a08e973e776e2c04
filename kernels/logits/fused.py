"""Logits processors in two Triton kernels: one reads and writes each logit once, the other one
those that have a bias or end a bad word."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.logits.processors import (
    MOST_COUNTED,
    NO_COLUMN,
    NO_TOKEN,
    ProcessorState,
)
from nanovllm.kernels.slots.ops import SETTLED
from nanovllm.token_sets import WORD_BITS

COLUMNS = 2048

_MOST_COUNTED = tl.constexpr(MOST_COUNTED)
_NO_COLUMN = tl.constexpr(NO_COLUMN)
_NO_TOKEN = tl.constexpr(NO_TOKEN)
_SETTLED = tl.constexpr(SETTLED)
_WORD_BITS = tl.constexpr(WORD_BITS)


def process(
    logits: Tensor,
    rows: Tensor,
    state: ProcessorState,
    slots: Tensor,
    positions: Tensor,
    first: int,
) -> Tensor:
    """As `processors.process`; each row of the logits is contiguous."""
    count, shard = len(rows), logits.shape[1]
    processed = torch.empty((count, shard), dtype=torch.float32, device=logits.device)
    if not count:
        return processed
    shared = (processed, logits, logits.stride(0), rows, slots, positions, first, shard)
    of_all = (*state[:7], state.allowed.shape[1])
    _process[(count, triton.cdiv(shard, COLUMNS))](
        *shared, *of_all, COLUMNS=COLUMNS, enable_fp_fusion=False
    )
    biases = state.bias.shape[1]
    bad_words, beginning = state.beginnings.shape[1:]
    _process_listed[(count,)](
        *shared,
        *of_all,
        *state[7:],
        biases,
        bad_words,
        beginning,
        BIASES=triton.next_power_of_2(biases),
        BAD_WORDS=triton.next_power_of_2(bad_words),
        BEGINNING=triton.next_power_of_2(beginning),
        enable_fp_fusion=False,
    )
    return processed


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
    processed_ptr,
    logits_ptr,
    stride,
    rows_ptr,
    slots_ptr,
    positions_ptr,
    first,
    shard,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    min_length_ptr,
    seen_ptr,
    allowed_ptr,
    held_off_ptr,
    words,
    COLUMNS: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < shard
    row = tl.load(rows_ptr + index)
    slot = tl.load(slots_ptr + index)
    logits = tl.load(logits_ptr + row * stride + columns, mask=inside, other=0).to(tl.float32)
    processed = _processed(
        logits,
        columns,
        inside,
        slot,
        tl.load(positions_ptr + index),
        first,
        shard,
        repetition_ptr,
        frequency_ptr,
        presence_ptr,
        min_length_ptr,
        seen_ptr,
        allowed_ptr,
        held_off_ptr,
        words,
    )
    tl.store(processed_ptr + index * shard + columns, processed, mask=inside)


@triton.jit(do_not_specialize=["first"])
def _process_listed(
    processed_ptr,
    logits_ptr,
    stride,
    rows_ptr,
    slots_ptr,
    positions_ptr,
    first,
    shard,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    min_length_ptr,
    seen_ptr,
    allowed_ptr,
    held_off_ptr,
    words,
    bias_columns_ptr,
    bias_ptr,
    beginnings_ptr,
    lasts_ptr,
    tail_ptr,
    biases,
    bad_words,
    beginning,
    BIASES: tl.constexpr,
    BAD_WORDS: tl.constexpr,
    BEGINNING: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index)
    slot = tl.load(slots_ptr + index)
    out = processed_ptr + index * shard

    entries = tl.arange(0, BIASES)
    entry = slot * biases + entries
    columns = tl.load(bias_columns_ptr + entry, mask=entries < biases, other=_NO_COLUMN)
    used = columns != _NO_COLUMN
    logits = tl.load(logits_ptr + row * stride + columns, mask=used, other=0).to(tl.float32)
    processed = _processed(
        logits + tl.load(bias_ptr + entry, mask=used, other=0),
        columns,
        used,
        slot,
        tl.load(positions_ptr + index),
        first,
        shard,
        repetition_ptr,
        frequency_ptr,
        presence_ptr,
        min_length_ptr,
        seen_ptr,
        allowed_ptr,
        held_off_ptr,
        words,
    )
    tl.store(out + columns, processed, mask=used)
    tl.debug_barrier()  # a token with a bias may end a bad word

    word = tl.arange(0, BAD_WORDS)
    lasts = tl.load(lasts_ptr + slot * bad_words + word, mask=word < bad_words, other=_NO_COLUMN)
    used = lasts != _NO_COLUMN
    place = tl.arange(0, BEGINNING)
    inside = used[:, None] & (place < beginning)[None, :]
    at = (slot * bad_words + word)[:, None] * beginning + place[None, :]
    wanted = tl.load(beginnings_ptr + at, mask=inside, other=_NO_TOKEN)
    tail = tl.load(tail_ptr + slot * beginning + place, mask=place < beginning, other=_NO_TOKEN)
    said = (wanted == _NO_TOKEN) | (wanted == tail[None, :])
    said = used & (tl.min(said.to(tl.int32), 1) != 0)
    tl.store(out + lasts, float("-inf"), mask=said)


@triton.jit
def _processed(
    logits,  # of a row, the bias included
    columns,
    present,  # whether there is such a column
    slot,
    position,
    first,
    shard,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    min_length_ptr,
    seen_ptr,
    allowed_ptr,
    held_off_ptr,
    words,
):
    """What the processors make of logits, bad words of several tokens apart."""
    seen = tl.load(seen_ptr + slot * shard + columns, mask=present, other=0).to(tl.int32)
    repetition = tl.load(repetition_ptr + slot)
    penalized = tl.where(logits > 0, tl.div_rn(logits, repetition), logits * repetition)
    logits = tl.where(seen != 0, penalized, logits)
    count = seen & _MOST_COUNTED
    logits -= tl.load(frequency_ptr + slot) * count.to(tl.float32)
    logits -= tl.load(presence_ptr + slot) * (count > 0).to(tl.float32)

    tokens = first + columns
    word = slot * words + tokens // _WORD_BITS
    bit = tokens % _WORD_BITS
    allowed = (tl.load(allowed_ptr + word, mask=present, other=0) >> bit) & 1
    held_off = (tl.load(held_off_ptr + word, mask=present, other=0) >> bit) & 1
    early = position < tl.load(min_length_ptr + slot)
    return tl.where((allowed == 0) | (early & (held_off != 0)), float("-inf"), logits)
