"""Matrix products of up to 16 rows in Triton, on tensor cores.

The rows are padded to the 16 that a tensor core takes at least. Where there are too few outputs to
occupy all processors, the inputs are split as well: each split writes its sums, and a second kernel
adds them up, always in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.layers.linear import Around

MAX_ROWS = 16
# Outputs that a program of `_join` takes.
JOIN_TILE = 256


class Tuning(NamedTuple):
    """A program's tile, powers of two from 16, and how many parts the inputs are split into."""

    outputs: int
    inputs: int
    splits: int
    warps: int
    stages: int


def linear(x: Tensor, weight: Tensor, around: Around, tuning: Tuning) -> Tensor:
    """See `linear.linear`; x has at most `MAX_ROWS` rows, and `around` no norm: a normalized input
    would have to be rounded before its norm is known."""
    if around.norm is not None:
        raise ValueError("a norm cannot be fused with a product on tensor cores")
    rows, inputs = x.shape
    outputs = len(weight) // 2 if around.gated else len(weight)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    residual, splits = around.residual, tuning.splits
    parts = out
    if splits > 1:
        size = (2 if around.gated else 1, splits, rows, outputs)
        parts = torch.empty(size, dtype=torch.float32, device=x.device)
    _linear[(triton.cdiv(outputs, tuning.outputs), splits)](
        x,
        weight,
        x if residual is None else residual,
        out,
        parts,
        rows,
        GATED=around.gated,
        ADD=residual is not None,
        ROWS=MAX_ROWS,
        OUTPUTS=outputs,
        INPUTS=inputs,
        SPLITS=splits,
        TILE_OUT=tuning.outputs,
        TILE_IN=tuning.inputs,
        num_warps=tuning.warps,
        num_stages=tuning.stages,
    )
    if splits > 1:
        _join[(rows, triton.cdiv(outputs, JOIN_TILE))](
            parts,
            x if residual is None else residual,
            out,
            GATED=around.gated,
            ADD=residual is not None,
            OUTPUTS=outputs,
            SPLITS=splits,
            TILE=JOIN_TILE,
            num_warps=2,
        )
    return out


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x_ptr,  # [rows, INPUTS]
    weight_ptr,  # [OUTPUTS, INPUTS], twice if GATED
    residual_ptr,  # [rows, OUTPUTS], if ADD
    out_ptr,  # [rows, OUTPUTS]; written where SPLITS is 1
    parts_ptr,  # float32 [SPLITS, rows, OUTPUTS], twice if GATED
    rows,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
):
    split = tl.program_id(1)
    outputs = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    is_output = outputs < OUTPUTS
    row = tl.arange(0, ROWS)
    is_row = row < rows
    weight_rows = weight_ptr + outputs.to(tl.int64)[:, None] * INPUTS
    TILES: tl.constexpr = (INPUTS + TILE_IN * SPLITS - 1) // (TILE_IN * SPLITS)

    out = tl.zeros([ROWS, TILE_OUT], tl.float32)
    let_pass = tl.zeros([ROWS, TILE_OUT], tl.float32)
    for tile in range(TILES):
        inputs = (split * TILES + tile) * TILE_IN + tl.arange(0, TILE_IN)
        is_input = inputs < INPUTS
        inside = is_output[:, None] & is_input[None, :]
        x_offsets = row[:, None] * INPUTS + inputs[None, :]
        x = tl.load(x_ptr + x_offsets, mask=is_row[:, None] & is_input[None, :], other=0.0)
        pointers = weight_rows + inputs[None, :]
        weight = tl.load(pointers, mask=inside, other=0.0)
        out = tl.dot(x, tl.trans(weight), out, input_precision="ieee")
        if GATED:
            up = tl.load(pointers + OUTPUTS * INPUTS, mask=inside, other=0.0)
            let_pass = tl.dot(x, tl.trans(up), let_pass, input_precision="ieee")

    inside = is_row[:, None] & is_output[None, :]
    if SPLITS == 1:
        offsets = row[:, None] * OUTPUTS + outputs[None, :]
        if GATED:
            out = out / (1.0 + tl.exp(-out)) * let_pass
        if ADD:
            out += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        offsets = (split * rows + row[:, None]) * OUTPUTS + outputs[None, :]
        tl.store(parts_ptr + offsets, out, mask=inside)
        if GATED:
            tl.store(parts_ptr + SPLITS * rows * OUTPUTS + offsets, let_pass, mask=inside)


@triton.jit
def _join(
    parts_ptr,  # float32 [SPLITS, rows, OUTPUTS], twice if GATED
    residual_ptr,  # [rows, OUTPUTS], if ADD
    out_ptr,  # [rows, OUTPUTS]
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0)
    rows = tl.num_programs(0)
    outputs = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = outputs < OUTPUTS
    offsets = row * OUTPUTS + outputs
    out = tl.zeros([TILE], tl.float32)
    let_pass = tl.zeros([TILE], tl.float32)
    for split in tl.static_range(SPLITS):
        part_ptr = parts_ptr + split * rows * OUTPUTS + offsets
        out += tl.load(part_ptr, mask=inside, other=0.0)
        if GATED:
            let_pass += tl.load(part_ptr + SPLITS * rows * OUTPUTS, mask=inside, other=0.0)
    if GATED:
        out = out / (1.0 + tl.exp(-out)) * let_pass
    if ADD:
        out += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)
