"""GEMMs of FP8 weights on a GPU, see `fp8`: in Triton for some rows, by cuBLAS for many.

With some rows a GEMM's time is that of reading the weight. So all processors must read: where the
outputs alone make too few programs, the inputs are split too, and the last program of an output
tile adds up the parts.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from nanovllm.kernels.layers.fp8 import BLOCK, FP8, INVERSE_MAX, Fp8Rows, Fp8Weight
from nanovllm.kernels.overlap import await_previous, launch_next, overlapped

# With more rows cuBLAS is faster.
MAX_ROWS = 64
# With at most so many rows, tensor cores leave room for larger tiles of outputs.
FEW_ROWS = 16
# About as many programs as an H100 runs at once.
PROGRAMS = 512
MAX_SPLITS = 8
# Inputs are split only where there are at most so many tiles of outputs.
MAX_SPLIT_TILES = PROGRAMS
# The fewest blocks of inputs that are worth a program.
MIN_BLOCKS = 4
QUANTIZE_WARPS = 4
# cuBLAS reads the scales of inputs in columns of a multiple of so many.
ALIGNED = 4


class GemmTuning(NamedTuple):
    """Rows and outputs of a program, powers of two, `outputs` at most `BLOCK`; into how many parts
    the inputs are split; warps; and how many blocks of inputs a program has in flight."""

    rows: int
    outputs: int
    splits: int
    warps: int
    stages: int


def choose_tuning(rows: int, inputs: int, outputs: int, gated: bool) -> GemmTuning | None:
    """A tuning among the fastest on an H100 for the shapes of Qwen3-8B at 3, 16 and 64 rows; None
    where cuBLAS is faster."""
    if rows > MAX_ROWS:
        return None
    few = rows <= FEW_ROWS
    tile_rows = max(16, triton.next_power_of_2(rows))
    if gated:
        return GemmTuning(tile_rows, 64, 1, 4, 3)
    tile = 64 if few else 32
    splits = min(PROGRAMS * tile // outputs, inputs // BLOCK // MIN_BLOCKS, MAX_SPLITS)
    # A power of two: each number of splits is a kernel to compile.
    return GemmTuning(tile_rows, tile, 1 << max(splits, 1).bit_length() - 1, 4, 3 if few else 4)


def linear(
    x: Fp8Rows, rows: int, weight: Fp8Weight, dtype: torch.dtype, gated: bool, tuning: GemmTuning
) -> Tensor:
    """The first `rows` of x, at most `MAX_ROWS`, times the weight; gated as by `ops.linear`.

    Returns:
        [rows, outputs] in `dtype`, half as many outputs where gated.
    """
    inputs = x.values.shape[1]
    outputs = len(weight.values) // (1 + gated)
    tiles = triton.cdiv(outputs, tuning.outputs), triton.cdiv(rows, tuning.rows)
    device = x.values.device
    out = torch.empty(rows, outputs, dtype=dtype, device=device)
    split = tuning.splits > 1
    parts = out
    if split:
        parts = torch.empty(tuning.splits, rows, outputs, dtype=torch.float32, device=device)
    _gemm[(*tiles, tuning.splits)](
        x.values,
        x.scales,
        weight.values,
        weight.scales,
        out,
        parts,
        _arrivals(device) if split else out,
        rows,
        x.scales.stride(1),
        GATED=gated,
        OUTPUTS=outputs,
        INPUTS=inputs,
        SCALES_STRIDE=weight.scales.stride(0),
        BLOCK=BLOCK,
        TILE_ROWS=tuning.rows,
        TILE_OUT=tuning.outputs,
        SPLITS=tuning.splits,
        STAGES=tuning.stages,
        num_warps=tuning.warps,
        **overlapped(),
    )
    return out


@cache
def _arrivals(device: torch.device) -> Tensor:
    """For each output tile, how many of its parts are there. The last one sets it to 0 again."""
    return torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=device)


def linear_of_many(x: Fp8Rows, rows: int, weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
    """As `linear`, for any number of rows."""
    out = scaled_mm(
        x.values,
        weight.values.t(),
        x.scales,
        ScalingType.BlockWise1x128,
        _padded(weight.scales).t(),
        ScalingType.BlockWise128x128,
        output_dtype=dtype,
    )
    return out[:rows]


def _padded(scales: Tensor) -> Tensor:
    """The scales with what `Fp8Weight.empty` has allocated behind each row: cuBLAS asks for it."""
    return scales.as_strided((len(scales), scales.stride(0)), scales.stride())


def quantize_rows(x: Tensor) -> Fp8Rows:
    """See `fp8.quantize_rows`. The rows are padded to a multiple of `ALIGNED`, with any values, and
    the scales lie as columns."""
    rows, inputs = x.shape
    padded = triton.cdiv(rows, ALIGNED) * ALIGNED
    values = torch.empty(padded, inputs, dtype=FP8, device=x.device)
    scales = torch.empty(inputs // BLOCK, padded, dtype=torch.float32, device=x.device)
    _quantize_rows[(rows,)](
        x,
        values,
        scales,
        padded,
        INPUTS=inputs,
        PADDED=triton.next_power_of_2(inputs),
        BLOCK=BLOCK,
        INVERSE_MAX=INVERSE_MAX,
        num_warps=QUANTIZE_WARPS,
        **overlapped(),
    )
    return Fp8Rows(values, scales.t())


@triton.jit
def _quantized(x, INVERSE_MAX: tl.constexpr):
    """x [rows, BLOCK] in float32. Returns e4m3 values, and the scales [rows]."""
    greatest = tl.max(tl.abs(x), 1)
    scales = tl.where(greatest > 0, greatest * INVERSE_MAX, 1.0)
    return (x * (1.0 / scales)[:, None]).to(tl.float8e4nv), scales


@triton.jit(do_not_specialize=["padded"])
def _quantize_rows(
    x_ptr,  # [rows, INPUTS]
    values_ptr,  # e4m3 [padded, INPUTS]
    scales_ptr,  # float32 [INPUTS / BLOCK, padded]
    padded,
    INPUTS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    INVERSE_MAX: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    launch_next(OVERLAP)
    row = tl.program_id(0)
    groups = tl.arange(0, PADDED // BLOCK)
    columns = groups[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    offsets = row.to(tl.int64) * INPUTS + columns
    inside = columns < INPUTS
    await_previous(OVERLAP)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    values, scales = _quantized(x, INVERSE_MAX)
    tl.store(values_ptr + offsets, values, mask=inside)
    tl.store(scales_ptr + groups * padded + row, scales, mask=groups < INPUTS // BLOCK)


@triton.jit(do_not_specialize=["rows", "padded"])
def _gemm(
    x_ptr,  # e4m3 [padded, INPUTS]
    x_scales_ptr,  # float32 [INPUTS / BLOCK, padded]
    weight_ptr,  # e4m3 [OUTPUTS, INPUTS], twice if GATED
    scales_ptr,  # float32, of each block of the weight
    out_ptr,  # [rows, OUTPUTS]
    parts_ptr,  # float32 [SPLITS, rows, OUTPUTS], if there are SPLITS
    arrivals_ptr,  # int32, one for each output tile, if there are SPLITS
    rows,
    padded,
    GATED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    SCALES_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    launch_next(OVERLAP)
    BLOCKS: tl.constexpr = INPUTS // BLOCK
    PART: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    first = tl.program_id(0) * TILE_OUT
    row = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    part = tl.program_id(2)
    outputs = first + tl.arange(0, TILE_OUT)
    inputs = tl.arange(0, BLOCK)
    is_row = (row < rows)[:, None]
    x = x_ptr + row.to(tl.int64)[:, None] * INPUTS + inputs[None, :]
    weights = weight_ptr + outputs.to(tl.int64)[None, :] * INPUTS + inputs[:, None]
    ups = weights + OUTPUTS * INPUTS
    scales = scales_ptr + (first // BLOCK) * SCALES_STRIDE
    up_scales = scales + (OUTPUTS // BLOCK) * SCALES_STRIDE
    await_previous(OVERLAP)
    sums = tl.zeros([TILE_ROWS, TILE_OUT], tl.float32)
    up_sums = tl.zeros([TILE_ROWS, TILE_OUT], tl.float32)
    last = tl.minimum((part + 1) * PART, BLOCKS)
    for block in tl.range(part * PART, last, num_stages=STAGES):
        values = tl.load(x + block * BLOCK, mask=is_row, other=0.0)
        row_scales = tl.load(x_scales_ptr + block * padded + row, mask=row < rows, other=0.0)
        weight = tl.load(weights + block * BLOCK, eviction_policy="evict_first")
        sums += tl.dot(values, weight) * (row_scales * tl.load(scales + block))[:, None]
        if GATED:
            up = tl.load(ups + block * BLOCK, eviction_policy="evict_first")
            up_sums += tl.dot(values, up) * (row_scales * tl.load(up_scales + block))[:, None]
    if GATED:
        sums = sums / (1.0 + tl.exp(-sums)) * up_sums
    offsets = row.to(tl.int64)[:, None] * OUTPUTS + outputs[None, :]
    if SPLITS == 1:
        tl.store(out_ptr + offsets, sums.to(out_ptr.dtype.element_ty), mask=is_row)
    else:
        size = rows.to(tl.int64) * OUTPUTS
        tl.store(parts_ptr + part * size + offsets, sums, mask=is_row)
        tl.debug_barrier()  # all threads have stored
        arrivals = arrivals_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(arrivals, 1) == SPLITS - 1:
            # In the parts' order, so that the sum does not depend on which program is last.
            total = tl.zeros([TILE_ROWS, TILE_OUT], tl.float32)
            for other in tl.static_range(SPLITS):
                total += tl.load(
                    parts_ptr + other * size + offsets, mask=is_row, cache_modifier=".cg"
                )
            tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=is_row)
            tl.store(arrivals, 0)
