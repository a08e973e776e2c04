"""Matrix products of up to 4 rows in Triton, without tensor cores.

A product of so few rows reads its weight once and does little with it, and takes microseconds: what
counts is that all processors have loads in flight at once and for the whole time. A program has all
inputs of a few outputs. Each thread keeps sums of its own over its inputs, and only at the end are
they added up, so that nothing in between waits for anything but memory. With tensor cores a sum
would wait for the one before, each time. Weights are on their way before the kernel that computes
the inputs is complete.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.layers.linear import Around
from nanovllm.kernels.overlap import await_previous, begin, overlapped

MAX_ROWS = 4
# Of several rows, products with more inputs and outputs are faster on tensor cores.
SMALL = 1024
# With no more outputs, a program for each few of them has to be larger for all processors to have
# enough loads in flight.
NARROW = 2048
WIDE = 4096
# Programs are small up to so many inputs.
SHORT = 2560
# Neighbouring inputs that a thread has of each tile: 16 bytes in bfloat16, its widest load. With
# all threads side by side along the inputs, each multiplies what it has loaded itself.
PER_LOAD = 8
# Weights that a thread loads before the inputs are there, at most: they take registers.
AHEAD = 32


class Tuning(NamedTuple):
    """Outputs of a program, and its warps; powers of two."""

    outputs: int
    warps: int


def linear(x: Tensor, weight: Tensor, around: Around, tuning: Tuning) -> Tensor:
    """See `linear.linear`; x has at most `MAX_ROWS` rows."""
    rows, inputs = x.shape
    outputs = len(weight) // 2 if around.gated else len(weight)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    norm, residual = around.norm, around.residual
    # Few kernels, since each has to be compiled.
    padded = 1 if rows == 1 else MAX_ROWS
    tile = 32 * tuning.warps * PER_LOAD
    _linear[(triton.cdiv(outputs, tuning.outputs),)](
        x,
        weight,
        x if norm is None else norm.weight,
        x if residual is None else residual,
        out,
        rows,
        0.0 if norm is None else norm.eps,
        NORM=norm is not None,
        GATED=around.gated,
        ADD=residual is not None,
        ROWS=padded,
        OUTPUTS=outputs,
        INPUTS=inputs,
        TILE_OUT=tuning.outputs,
        TILE_IN=tile,
        PER_LOAD=PER_LOAD,
        TILES_AHEAD=min(
            triton.cdiv(inputs, tile), AHEAD // (PER_LOAD * tuning.outputs * (1 + around.gated))
        ),
        num_warps=tuning.warps,
        **overlapped(),
    )
    return out


def choose_tuning(rows: int, inputs: int, outputs: int, gated: bool) -> Tuning | None:
    """Among the fastest on an H200 (`benchmarks.products`), for the shapes of Qwen3-0.6B to 8B at 1
    and 4 rows; None where cuBLAS is faster."""
    if rows > 1:
        if rows > MAX_ROWS or (inputs if gated else min(inputs, outputs)) > SMALL:
            return None
        return Tuning(2, 4) if outputs <= NARROW and not gated else Tuning(4, 2)
    if gated:
        if inputs > SHORT:
            return Tuning(4, 4)
        return Tuning(2, 2) if inputs <= SMALL else Tuning(2, 4)
    if outputs <= NARROW:
        return Tuning(2, 8)
    if inputs <= SHORT:
        return Tuning(2, 2)
    return Tuning(2, 4) if outputs < WIDE else Tuning(4, 8)


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x_ptr,  # [rows, INPUTS]
    weight_ptr,  # [OUTPUTS, INPUTS], twice if GATED
    norm_ptr,  # [INPUTS], if NORM
    residual_ptr,  # [rows, OUTPUTS], if ADD
    out_ptr,  # [rows, OUTPUTS]
    rows,
    eps,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    PER_LOAD: tl.constexpr,
    TILES_AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    THREADS: tl.constexpr = TILE_IN // PER_LOAD
    rows_of = tl.arange(0, ROWS)[:, None, None]
    outputs_of = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)[None, :, None]
    inputs_of = tl.arange(0, TILE_IN)[None, None, :]
    weights = weight_ptr + outputs_of.to(tl.int64) * INPUTS + inputs_of
    ups = weights + OUTPUTS * INPUTS
    is_output = outputs_of < OUTPUTS

    ahead = _load_tiles(weights, inputs_of, is_output, INPUTS, TILE_IN, TILES_AHEAD)
    if GATED:
        ups_ahead = _load_tiles(ups, inputs_of, is_output, INPUTS, TILE_IN, TILES_AHEAD)
    await_previous(OVERLAP)

    sums = tl.zeros([ROWS, TILE_OUT, THREADS], tl.float32)
    up_sums = tl.zeros([ROWS, TILE_OUT, THREADS], tl.float32)
    squares = tl.zeros([ROWS, 1, TILE_IN], tl.float32)
    # Unrolled, so that loads need not wait for the sums before.
    for start in tl.static_range(0, INPUTS, TILE_IN):
        inputs = start + inputs_of
        is_input = inputs < INPUTS
        inside = is_output & is_input
        if start < TILES_AHEAD * TILE_IN:
            weight = ahead[start // TILE_IN]
            if GATED:
                up = ups_ahead[start // TILE_IN]
        else:
            weight = _load_once(weights + start, inside)
            if GATED:
                up = _load_once(ups + start, inside)
        x_pointers = x_ptr + rows_of * INPUTS + inputs
        x = tl.load(x_pointers, mask=(rows_of < rows) & is_input, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(norm_ptr + inputs, mask=is_input, other=0.0).to(tl.float32)
        sums += _sum_of_loads(x * weight.to(tl.float32), PER_LOAD)
        if GATED:
            up_sums += _sum_of_loads(x * up.to(tl.float32), PER_LOAD)

    out = tl.sum(sums, 2)
    if NORM:
        # The norm's factor is the same for all inputs of a row, so it can come last.
        scale = tl.rsqrt(tl.sum(squares, 2) / INPUTS + eps)
        out *= scale
    if GATED:
        let_pass = tl.sum(up_sums, 2)
        if NORM:
            let_pass *= scale
        out = out / (1.0 + tl.exp(-out)) * let_pass
    row = tl.arange(0, ROWS)[:, None]
    outputs = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)[None, :]
    offsets = row * OUTPUTS + outputs
    inside = (row < rows) & (outputs < OUTPUTS)
    if ADD:
        out += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_tiles(weights, inputs_of, is_output, INPUTS, TILE_IN, TILES):
    """The first tiles, a tuple."""
    tiles = ()
    for tile in tl.static_range(TILES):
        inside = is_output & (tile * TILE_IN + inputs_of < INPUTS)
        tiles += (_load_once(weights + tile * TILE_IN, inside),)  # type: ignore[assignment]
    return tiles


@triton.jit
def _load_once(pointers, inside):
    return tl.load(pointers, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _sum_of_loads(x, PER_LOAD: tl.constexpr):
    """[..., threads * PER_LOAD] to [..., threads]: each thread adds up what it has."""
    loads: tl.constexpr = [x.shape[0], x.shape[1], x.shape[2] // PER_LOAD, PER_LOAD]
    return tl.sum(tl.reshape(x, loads), 3)
