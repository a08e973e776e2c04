"""The operations of `kernels.slots.ops` in Triton, one kernel each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.overlap import await_previous, launch_next, overlapped
from nanovllm.kernels.sampling.reference import NOT_FINITE, SamplingTensors
from nanovllm.kernels.slots.ops import SETTLED, DecodeInputs, DrawInputs, SlotOps, SlotState
from nanovllm.token_sets import WORD_BITS

# Slots that a program of `_advance` takes.
TILE = 128


class FusedSlotOps(SlotOps):
    """For CUDA tensors."""

    def gather(self, state: SlotState, slots: Tensor, block_size: int) -> DecodeInputs:
        n, columns = len(slots), state.block_tables.shape[1]

        def like(held: Tensor, dtype: torch.dtype | None = None) -> Tensor:
            return torch.empty((n, *held.shape[1:]), dtype=dtype or held.dtype, device=held.device)

        inputs = DecodeInputs(
            token_ids=like(state.last_tokens),
            positions=like(state.num_tokens),
            kv_indices=like(state.num_tokens),
            context_lens=like(state.num_tokens, torch.int32),
            block_tables=like(state.block_tables),
            next_positions=like(state.num_tokens),
            sampling=SamplingTensors(*map(like, state.sampling)),
        )
        _gather[(n,)](
            slots,
            state.block_tables,
            state.num_tokens,
            state.last_tokens,
            *state.sampling,
            *inputs[:-1],
            *inputs.sampling,
            columns,
            PADDED=triton.next_power_of_2(columns),
            BLOCK=block_size,
            num_warps=1,
        )
        return inputs

    def gather_draw(
        self, state: SlotState, drawn: Tensor, token_ids: Tensor, masks: Tensor | None = None
    ) -> DrawInputs:
        rows, slots = drawn
        inputs = DrawInputs(
            torch.empty_like(slots),
            SamplingTensors(*(torch.empty_like(slots, dtype=of.dtype) for of in state.sampling)),
        )
        _gather_draw[(len(slots),)](
            rows,
            slots,
            state.num_tokens,
            *state.sampling,
            inputs.positions,
            *inputs.sampling,
            token_ids,
            token_ids if masks is None else masks,
            0 if masks is None else masks.stride(0),
            len(state.num_tokens) - 1,
            MASKED=masks is not None,
            num_warps=1,
        )
        return inputs

    def replace(
        self, rows: Tensor, positions: Tensor, token_ids: Tensor, out: Tensor, none_left: int
    ) -> None:
        _replace[(len(rows),)](
            rows, positions, token_ids, out, none_left, num_warps=1, **overlapped()
        )

    def advance(self, state: SlotState, slots: Tensor, token_ids: Tensor) -> Tensor:
        n = len(token_ids)
        # The kernel writes to the host. The GPU's copy engine would begin later, and so would the
        # step after it.
        host = torch.empty(n, dtype=torch.int32, pin_memory=token_ids.is_cuda)
        if n:
            _advance[(triton.cdiv(n, TILE),)](
                slots,
                token_ids,
                state.num_tokens,
                state.last_tokens,
                host,
                n,
                TILE=TILE,
                num_warps=1,
            )
        return host


@triton.jit
def _gather(
    slots_ptr,
    tables_ptr,
    num_tokens_ptr,
    last_tokens_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    token_ids_ptr,
    positions_ptr,
    kv_indices_ptr,
    context_lens_ptr,
    out_tables_ptr,
    next_positions_ptr,
    out_temperature_ptr,
    out_top_k_ptr,
    out_top_p_ptr,
    out_min_p_ptr,
    out_seed_ptr,
    columns,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    length = tl.load(num_tokens_ptr + slot)
    position = length - 1
    table = tables_ptr + slot * columns
    block = tl.load(table + position // BLOCK).to(tl.int64)
    tl.store(token_ids_ptr + row, tl.load(last_tokens_ptr + slot))
    tl.store(positions_ptr + row, position)
    tl.store(kv_indices_ptr + row, block * BLOCK + position % BLOCK)
    tl.store(context_lens_ptr + row, length.to(tl.int32))
    tl.store(next_positions_ptr + row, length)
    tl.store(out_temperature_ptr + row, tl.load(temperature_ptr + slot))
    tl.store(out_top_k_ptr + row, tl.load(top_k_ptr + slot))
    tl.store(out_top_p_ptr + row, tl.load(top_p_ptr + slot))
    tl.store(out_min_p_ptr + row, tl.load(min_p_ptr + slot))
    tl.store(out_seed_ptr + row, tl.load(seed_ptr + slot))
    column = tl.arange(0, PADDED)
    present = column < columns
    tl.store(
        out_tables_ptr + row * columns + column,
        tl.load(table + column, mask=present),
        mask=present,
    )


_NOT_FINITE = tl.constexpr(NOT_FINITE)
_SETTLED = tl.constexpr(SETTLED)
_WORD_BITS = tl.constexpr(WORD_BITS)


@triton.jit
def _gather_draw(
    rows_ptr,
    slots_ptr,
    num_tokens_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    positions_ptr,
    out_temperature_ptr,
    out_top_k_ptr,
    out_top_p_ptr,
    out_min_p_ptr,
    out_seed_ptr,
    token_ids_ptr,  # this and the rest are used if MASKED
    masks_ptr,
    masks_stride,
    padding_slot,
    MASKED: tl.constexpr,
):
    index = tl.program_id(0)
    slot = tl.load(slots_ptr + index)
    position = tl.load(num_tokens_ptr + slot)
    temperature = tl.load(temperature_ptr + slot)
    top_k = tl.load(top_k_ptr + slot)
    top_p = tl.load(top_p_ptr + slot)
    min_p = tl.load(min_p_ptr + slot)
    if MASKED:
        token = tl.load(token_ids_ptr + tl.load(rows_ptr + index))
        known = tl.maximum(token, 0)
        word = tl.load(masks_ptr + index * masks_stride + known // _WORD_BITS)
        allowed = ((word >> (known % _WORD_BITS)) & 1) != 0
        filtered = (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0))
        settled = (token >= 0) & allowed & (filtered == 0)
        position = tl.where(settled | (slot == padding_slot), _SETTLED, position)
    tl.store(positions_ptr + index, position)
    tl.store(out_temperature_ptr + index, temperature)
    tl.store(out_top_k_ptr + index, top_k)
    tl.store(out_top_p_ptr + index, top_p)
    tl.store(out_min_p_ptr + index, min_p)
    tl.store(out_seed_ptr + index, tl.load(seed_ptr + slot))


@triton.jit
def _replace(
    rows_ptr,
    positions_ptr,
    token_ids_ptr,
    out_ptr,
    none_left,
    OVERLAP: tl.constexpr,
):
    launch_next(OVERLAP)
    await_previous(OVERLAP)
    index = tl.program_id(0)
    out = out_ptr + tl.load(rows_ptr + index)
    anew = tl.load(positions_ptr + index) != _SETTLED
    token = tl.load(token_ids_ptr + index)
    none = (token == _NOT_FINITE) & (tl.load(out) != _NOT_FINITE)
    tl.store(out, tl.where(none, none_left, token), mask=anew)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["slots_ptr"])
def _advance(
    slots_ptr,
    token_ids_ptr,
    num_tokens_ptr,
    last_tokens_ptr,
    host_ptr,  # int32 [n]
    n,
    TILE: tl.constexpr,
):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    present = at < n
    slots = tl.load(slots_ptr + at, mask=present, other=0)
    tokens = tl.load(token_ids_ptr + at, mask=present, other=0)
    lengths = tl.load(num_tokens_ptr + slots, mask=present, other=0)
    tl.store(host_ptr + at, tokens.to(tl.int32), mask=present)
    tl.store(last_tokens_ptr + slots, tl.maximum(tokens, 0), mask=present)
    tl.store(num_tokens_ptr + slots, lengths + 1, mask=present)
