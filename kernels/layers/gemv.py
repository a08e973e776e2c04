"""GEMV: GEMMs of up to 4 rows in Triton, without tensor cores.

A GEMV reads its weight once, computes little with it, and takes microseconds. Its speed is that of
memory, if all processors have loads in flight all the time. So a program computes a few outputs
over all inputs. Each thread keeps its own partial sums, which are added up only at the end: until
then a thread waits for nothing but memory. On tensor cores each sum would wait for the one before.
What needs no inputs, the first weights above all, is loaded before the kernel that computes the
inputs is complete.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.layers.fp8 import BLOCK, Fp8Weight
from nanovllm.kernels.layers.ops import Fusion, Weight
from nanovllm.kernels.overlap import await_previous, launch_next, overlapped

MAX_ROWS = 4
# With several rows, tensor cores are faster at more inputs and outputs.
SMALL = 1024
# With few outputs there are few programs: they must be larger for all processors to have enough
# loads in flight.
FEW_OUTPUTS = 2048
MANY_OUTPUTS = 4096
# Programs are small up to this number of inputs.
FEW_INPUTS = 2560
# With FP8 weights a program has fewer outputs beyond this number of inputs.
MANY_INPUTS = 8192
# A thread loads so many bytes of neighbouring weights of a tile, its widest load; of float32 twice
# as many. All threads lie side by side along the inputs, so each multiplies what it has loaded
# itself.
LOAD_BYTES = 16


class GemvTuning(NamedTuple):
    """How a GEMV is cut.

    Attributes:
        outputs, warps: of a program; powers of two.
        ahead: bytes of weights that a thread loads before the inputs are there, at most: they take
            registers.
    """

    outputs: int
    warps: int
    ahead: int = 64


def linear(
    x: Tensor, weight: Weight, fusion: Fusion, tuning: GemvTuning, out: Tensor | None = None
) -> Tensor:
    """See `ops.fused_linear`; x has at most `MAX_ROWS` rows. Writes to `out`, if given."""
    rows, inputs = x.shape
    values, scales = weight if isinstance(weight, Fp8Weight) else (weight, weight)
    outputs = len(values) // 2 if fusion.gated else len(values)
    per_load = LOAD_BYTES // min(values.itemsize, 2)
    if out is None:
        out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    norm, residual = fusion.norm, fusion.residual
    # Two kernels instead of four, since each has to be compiled.
    padded = 1 if rows == 1 else MAX_ROWS
    tile = 32 * tuning.warps * per_load
    _linear[(triton.cdiv(outputs, tuning.outputs),)](
        x,
        values,
        scales,
        x if norm is None else norm.weight,
        x if residual is None else residual,
        out,
        rows,
        0.0 if norm is None else norm.eps,
        NORM=norm is not None,
        GATED=fusion.gated,
        ADD=residual is not None,
        ROWS=padded,
        OUTPUTS=outputs,
        INPUTS=inputs,
        TILE_OUT=tuning.outputs,
        TILE_IN=tile,
        PER_LOAD=per_load,
        BLOCK=BLOCK if isinstance(weight, Fp8Weight) else 0,
        SCALES_STRIDE=scales.stride(0),
        TILES_AHEAD=min(
            triton.cdiv(inputs, tile),
            tuning.ahead // (LOAD_BYTES * tuning.outputs * (1 + fusion.gated)),
        ),
        num_warps=tuning.warps,
        **overlapped(),
    )
    return out


def choose_tuning(rows: int, inputs: int, outputs: int, gated: bool) -> GemvTuning | None:
    """A tuning among the fastest on an H200 (`benchmarks.gemm`) for the shapes of Qwen3-0.6B to 8B
    at 1 and 4 rows; None where cuBLAS is faster."""
    if rows > 1:
        if rows > MAX_ROWS or (inputs if gated else min(inputs, outputs)) > SMALL:
            return None
        return GemvTuning(2, 4) if outputs <= FEW_OUTPUTS and not gated else GemvTuning(4, 2)
    if gated:
        if inputs > FEW_INPUTS:
            return GemvTuning(4, 4, ahead=128)
        return GemvTuning(2, 2, ahead=128) if inputs <= SMALL else GemvTuning(2, 4)
    if outputs <= FEW_OUTPUTS:
        return GemvTuning(2, 8)
    if inputs <= FEW_INPUTS:
        return GemvTuning(4, 4) if inputs <= SMALL else GemvTuning(2, 2)
    return GemvTuning(2, 4) if outputs < MANY_OUTPUTS else GemvTuning(4, 8, ahead=128)


def choose_fp8_tuning(rows: int, inputs: int, gated: bool) -> GemvTuning | None:
    """As `choose_tuning`, for FP8 weights, on an H100 for the shapes of Qwen3-8B; None where
    `fp8_gemm` is faster."""
    if rows > 1:
        return None
    return GemvTuning(2, 4 if gated or inputs > MANY_INPUTS else 2)


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x_ptr,  # [rows, INPUTS]
    weight_ptr,  # [OUTPUTS, INPUTS], twice if GATED
    scales_ptr,  # float32, of each BLOCK x BLOCK of the weight, if BLOCK
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
    BLOCK: tl.constexpr,
    SCALES_STRIDE: tl.constexpr,
    TILES_AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    launch_next(OVERLAP)
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
    if NORM:
        norms = _load_norm(norm_ptr, inputs_of, INPUTS, TILE_IN)
    if BLOCK:
        load_of = tl.arange(0, THREADS)[None, None, :] * PER_LOAD
        scale_ptrs = scales_ptr + (outputs_of // BLOCK) * SCALES_STRIDE + load_of // BLOCK
        scales = _load_scales(scale_ptrs, load_of, is_output, INPUTS, TILE_IN, BLOCK)
        if GATED:
            scale_ptrs += (OUTPUTS // BLOCK) * SCALES_STRIDE
            up_scales = _load_scales(scale_ptrs, load_of, is_output, INPUTS, TILE_IN, BLOCK)
    await_previous(OVERLAP)

    row = tl.arange(0, ROWS)[:, None]
    outputs = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)[None, :]
    offsets = row * OUTPUTS + outputs
    is_out = (row < rows) & (outputs < OUTPUTS)
    if ADD:
        residual = tl.load(residual_ptr + offsets, mask=is_out, other=0.0).to(tl.float32)
    sums = tl.zeros([ROWS, TILE_OUT, THREADS], tl.float32)
    up_sums = tl.zeros([ROWS, TILE_OUT, THREADS], tl.float32)
    squares = tl.zeros([ROWS, 1, TILE_IN], tl.float32)
    # Unrolled, so that loads do not wait for earlier sums.
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
            x *= norms[start // TILE_IN].to(tl.float32)
        loaded = _sum_of_loads(x * weight.to(tl.float32), PER_LOAD)
        if GATED:
            up_loaded = _sum_of_loads(x * up.to(tl.float32), PER_LOAD)
        if BLOCK:
            loaded *= scales[start // TILE_IN]
            if GATED:
                up_loaded *= up_scales[start // TILE_IN]
        sums += loaded
        if GATED:
            up_sums += up_loaded

    out = tl.sum(sums, 2)
    if NORM:
        # The norm scales all inputs of a row alike, so the scale can be applied last.
        scale = tl.rsqrt(tl.sum(squares, 2) / INPUTS + eps)
        out *= scale
    if GATED:
        up_out = tl.sum(up_sums, 2)
        if NORM:
            up_out *= scale
        out = out / (1.0 + tl.exp(-out)) * up_out
    if ADD:
        out += residual
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=is_out)


@triton.jit
def _load_tiles(weights, inputs_of, is_output, INPUTS, TILE_IN, TILES):
    """Loads the first tiles; a tuple."""
    tiles = ()
    for tile in tl.static_range(TILES):
        inside = is_output & (tile * TILE_IN + inputs_of < INPUTS)
        tiles += (_load_once(weights + tile * TILE_IN, inside),)  # type: ignore[assignment]
    return tiles


@triton.jit
def _load_norm(norm_ptr, inputs_of, INPUTS, TILE_IN):
    """Loads the norm's weights; a tuple of all tiles."""
    tiles = ()
    for start in tl.static_range(0, INPUTS, TILE_IN):
        inputs = start + inputs_of
        tiles += (tl.load(norm_ptr + inputs, mask=inputs < INPUTS, other=0.0),)  # type: ignore[assignment]
    return tiles


@triton.jit
def _load_scales(pointers, load_of, is_output, INPUTS, TILE_IN, BLOCK):
    """Loads the scales of FP8 weights, one for each load; a tuple of all tiles."""
    tiles = ()
    for start in tl.static_range(0, INPUTS, TILE_IN):
        inside = is_output & (start + load_of < INPUTS)
        tiles += (tl.load(pointers + start // BLOCK, mask=inside, other=0.0),)  # type: ignore[assignment]
    return tiles


@triton.jit
def _load_once(pointers, inside):
    return tl.load(pointers, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _sum_of_loads(x, PER_LOAD: tl.constexpr):
    """[..., threads * PER_LOAD] to [..., threads]: each thread adds up its own elements."""
    loads: tl.constexpr = [x.shape[0], x.shape[1], x.shape[2] // PER_LOAD, PER_LOAD]
    return tl.sum(tl.reshape(x, loads), 3)
