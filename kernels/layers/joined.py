"""The GEMV after decode attention of one sequence, which joins the parts of a split context.

Each program joins all parts itself. That takes less time than another kernel, which joins the parts
once. A program loads its weights before attention is complete.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention.fused_decode import splits_used
from nanovllm.kernels.attention.interface import Parts
from nanovllm.kernels.attention.split_kv import UNUSED
from nanovllm.kernels.layers.gemv import SMALL, GemvTuning
from nanovllm.kernels.overlap import await_previous, launch_next, overlapped

# Elements of a row of weights that a thread loads, 16 bytes in bfloat16.
PER_THREAD = 8
MAX_WARPS = 8
# Splits that are joined at the same time: they take registers.
AT_ONCE = 16


def fits(weight: Tensor) -> bool:
    """Whether each program can join all parts, and there are not too many programs."""
    outputs, inputs = weight.shape
    return outputs <= SMALL and inputs <= MAX_WARPS * 32 * PER_THREAD


def linear(parts: Parts, weight: Tensor, residual: Tensor | None) -> Tensor:
    """Joins the parts and projects them; adds the residual [1, outputs], if any.

    Args:
        weight: [outputs, heads * head_dim].
    """
    heads, splits, dim = parts.out.shape
    outputs = len(weight)
    # The fastest of those tried on an H100 for Qwen3-0.6B's shape and a quarter of its heads.
    warps = max(triton.next_power_of_2(heads) * dim // (32 * PER_THREAD), 1)
    tuning = GemvTuning(16 if warps == MAX_WARPS else 8, warps)
    out = torch.empty(1, outputs, dtype=weight.dtype, device=weight.device)
    programs = triton.cdiv(outputs, tuning.outputs)
    _joined[(programs,)](
        parts.out,
        parts.lse,
        parts.length,
        weight,
        weight if residual is None else residual,
        out,
        ADD=residual is not None,
        OUTPUTS=outputs,
        TILE_OUT=tuning.outputs,
        HEADS=heads,
        ROWS=triton.next_power_of_2(heads),
        DIM=dim,
        SPLITS=splits,
        AT_ONCE=min(AT_ONCE, splits),
        TILE=parts.tile,
        num_warps=tuning.warps,
        **overlapped(),
    )
    return out


@triton.jit
def _joined(
    parts_ptr,  # [HEADS, SPLITS, DIM]
    lse_ptr,  # [HEADS, SPLITS]
    length_ptr,
    weight_ptr,  # [OUTPUTS, HEADS, DIM]
    residual_ptr,  # [OUTPUTS], if ADD
    out_ptr,
    ADD: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    launch_next(OVERLAP)
    # Tiles are [outputs or splits, ROWS, DIM]: a thread has all outputs and splits of its inputs,
    # which are of one head. Tiles are read as [outputs or splits, ROWS * DIM]: the last dimension
    # takes all threads, so each version of Triton cuts them alike.
    inputs = tl.arange(0, ROWS * DIM)[None, :]
    heads = tl.arange(0, ROWS)[None, :]
    parts = parts_ptr + inputs // DIM * (SPLITS * DIM) + inputs % DIM
    outputs = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    weight = tl.load(
        weight_ptr + outputs[:, None] * (HEADS * DIM) + inputs,
        mask=(outputs < OUTPUTS)[:, None] & (inputs < HEADS * DIM),
        other=0.0,
        eviction_policy="evict_first",
    )
    weight = tl.reshape(weight, [TILE_OUT, ROWS, DIM])
    used = splits_used(tl.load(length_ptr), SPLITS, TILE)
    await_previous(OVERLAP)
    if ADD:
        residual = tl.load(residual_ptr + outputs, mask=outputs < OUTPUTS, other=0.0)

    top = tl.full([1, ROWS, 1], UNUSED, tl.float32)
    total = tl.zeros([1, ROWS, 1], tl.float32)
    x = tl.zeros([1, ROWS, DIM], tl.float32)
    for first in range(0, used, AT_ONCE):
        splits = first + tl.arange(0, AT_ONCE)[:, None]
        present = splits < used
        lse = tl.load(
            lse_ptr + heads * SPLITS + splits, mask=present & (heads < HEADS), other=UNUSED
        )
        part = tl.load(parts + splits * DIM, mask=present & (inputs < HEADS * DIM), other=0.0)
        lse = tl.reshape(lse, [AT_ONCE, ROWS, 1])
        part = tl.reshape(part, [AT_ONCE, ROWS, DIM])
        new_top = tl.maximum(top, tl.max(lse, 0, keep_dims=True))
        shares = tl.exp2(lse - new_top)
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(shares, 0, keep_dims=True)
        x = x * rescale + tl.sum(part.to(tl.float32) * shares, 0, keep_dims=True)
        top = new_top
    out = tl.sum(tl.sum(x / total * weight.to(tl.float32), 2), 1)
    if ADD:
        out += residual.to(tl.float32)
    tl.store(out_ptr + outputs, out.to(out_ptr.dtype.element_ty), mask=outputs < OUTPUTS)
