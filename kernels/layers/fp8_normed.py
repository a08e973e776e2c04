"""A GEMV of one row behind a norm with FP8 weights: programs compute several tiles of outputs.

In `gemv` each program normalizes its inputs anew. With FP8 weights that takes more instructions
than multiplying them. Here there are about as many programs as a GPU runs at once, and each keeps
the normalized row in registers. In bf16 this is no faster.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.layers.fp8 import BLOCK, Fp8Weight
from nanovllm.kernels.layers.gemv import LOAD_BYTES
from nanovllm.kernels.layers.ops import Norm, Weight
from nanovllm.kernels.overlap import await_previous, launch_next, overlapped

# With fewer outputs there is too little for a program to do.
FEWEST_OUTPUTS = 3072
# Parts of a row that a program holds.
MAX_PARTS = 4


class NormedTuning(NamedTuple):
    """Outputs of a tile and warps of a program, powers of two; programs of a processor (SM)."""

    outputs: int
    warps: int
    programs: int


def choose_tuning(rows: int, weight: Weight, gated: bool) -> NormedTuning | None:
    """The fastest of those tried on an H100 in a step of one sequence of Qwen3-8B's shape; None
    where `gemv` is to be used."""
    if rows > 1 or not isinstance(weight, Fp8Weight):
        return None
    outputs, inputs = len(weight.values) // (1 + gated), weight.values.shape[1]
    tuning = NormedTuning(1, 2, 16) if gated else NormedTuning(1, 4, 8)
    part = _part(tuning)
    fits = outputs >= FEWEST_OUTPUTS and inputs % part == 0 and inputs <= MAX_PARTS * part
    return tuning if fits else None


def normed_linear(
    x: Tensor, norm: Norm, weight: Fp8Weight, gated: bool, tuning: NormedTuning
) -> Tensor:
    """`ops.fused_linear` of x [1, inputs] with a norm, gated or not. `inputs` must be a multiple of
    a load by each thread."""
    inputs, outputs = x.shape[1], len(weight.values) // (1 + gated)
    out = torch.empty(1, outputs, dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(outputs, tuning.outputs)
    programs = min(tiles, tuning.programs * _processors(x.device))
    _normed_linear[(programs,)](
        x,
        norm.weight,
        weight.values,
        weight.scales,
        out,
        norm.eps,
        GATED=gated,
        OUTPUTS=outputs,
        INPUTS=inputs,
        TILE_OUT=tuning.outputs,
        PART=_part(tuning),
        PER_LOAD=LOAD_BYTES,
        BLOCK=BLOCK,
        SCALES_STRIDE=weight.scales.stride(0),
        PROGRAMS=programs,
        num_warps=tuning.warps,
        **overlapped(),
    )
    return out


def _part(tuning: NormedTuning) -> int:
    """The inputs that all threads of a program load at once, a byte each."""
    return 32 * tuning.warps * LOAD_BYTES


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _normed_linear(
    x_ptr,  # [INPUTS]
    norm_ptr,  # [INPUTS]
    weight_ptr,  # e4m3 [OUTPUTS, INPUTS], twice if GATED
    scales_ptr,  # float32, of each BLOCK x BLOCK of the weight
    out_ptr,  # [OUTPUTS]
    eps,
    GATED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    PART: tl.constexpr,
    PER_LOAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALES_STRIDE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    launch_next(OVERLAP)
    PARTS: tl.constexpr = INPUTS // PART
    TILES: tl.constexpr = (OUTPUTS + TILE_OUT - 1) // TILE_OUT
    UP: tl.constexpr = OUTPUTS if GATED else 0
    program = tl.program_id(0)
    # The first weights and scales, and the norm's weights, are loaded before the inputs are there.
    weights = _load_tile(
        weight_ptr, scales_ptr, program, 0,
        OUTPUTS, INPUTS, TILE_OUT, PART, PARTS, PER_LOAD, BLOCK, SCALES_STRIDE,
    )  # fmt: skip
    ups = weights
    if GATED:
        ups = _load_tile(
            weight_ptr, scales_ptr, program, UP,
            OUTPUTS, INPUTS, TILE_OUT, PART, PARTS, PER_LOAD, BLOCK, SCALES_STRIDE,
        )  # fmt: skip
    columns = tl.arange(0, PART)[None, :]
    norms = ()
    for part in tl.static_range(PARTS):
        norms += (tl.load(norm_ptr + part * PART + columns),)  # type: ignore[assignment]
    await_previous(OVERLAP)
    squares = tl.zeros([1, PART], tl.float32)
    xs = ()
    for part in tl.static_range(PARTS):
        x = tl.load(x_ptr + part * PART + columns).to(tl.float32)
        squares += x * x
        xs += (x * norms[part].to(tl.float32),)  # type: ignore[assignment]
    # The norm scales all inputs alike, so the scale can be applied last.
    scale = tl.rsqrt(tl.sum(squares, 1) / INPUTS + eps)
    _compute_tile(
        xs, weights, ups, scale, out_ptr, program, GATED, OUTPUTS, TILE_OUT, PART, PARTS, PER_LOAD
    )
    for tile in tl.range(program + PROGRAMS, TILES, PROGRAMS):
        weights = _load_tile(
            weight_ptr, scales_ptr, tile, 0,
            OUTPUTS, INPUTS, TILE_OUT, PART, PARTS, PER_LOAD, BLOCK, SCALES_STRIDE,
        )  # fmt: skip
        ups = weights
        if GATED:
            ups = _load_tile(
                weight_ptr, scales_ptr, tile, UP,
                OUTPUTS, INPUTS, TILE_OUT, PART, PARTS, PER_LOAD, BLOCK, SCALES_STRIDE,
            )  # fmt: skip
        _compute_tile(
            xs, weights, ups, scale, out_ptr, tile, GATED, OUTPUTS, TILE_OUT, PART, PARTS, PER_LOAD
        )


@triton.jit
def _load_tile(
    weight_ptr, scales_ptr, tile, FIRST,
    OUTPUTS, INPUTS, TILE_OUT, PART, PARTS, PER_LOAD, BLOCK, SCALES_STRIDE,
):  # fmt: skip
    """The weights [TILE_OUT, PART] of each part, from row FIRST of the weight on, and the scales
    [TILE_OUT, threads] of what each thread loads of them; two tuples."""
    outputs = tile * TILE_OUT + tl.arange(0, TILE_OUT)[:, None]
    is_output = outputs < OUTPUTS
    offsets = (FIRST + outputs).to(tl.int64) * INPUTS + tl.arange(0, PART)[None, :]
    rows = scales_ptr + ((FIRST + outputs) // BLOCK) * SCALES_STRIDE
    threads = tl.arange(0, PART // PER_LOAD)[None, :]
    weights, scales = (), ()
    for part in tl.static_range(PARTS):
        weights += (  # type: ignore[assignment]
            tl.load(
                weight_ptr + offsets + part * PART,
                mask=is_output,
                other=0.0,
                eviction_policy="evict_first",
            ),
        )
    for part in tl.static_range(PARTS):
        blocks = (part * PART + threads * PER_LOAD) // BLOCK
        scales += (tl.load(rows + blocks, mask=is_output, other=0.0),)  # type: ignore[assignment]
    return weights, scales


@triton.jit
def _compute_tile(
    xs,
    weights,
    ups,
    scale,
    out_ptr,
    tile,
    GATED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    PER_LOAD: tl.constexpr,
):
    sums = tl.zeros([TILE_OUT, PART // PER_LOAD], tl.float32)
    up_sums = tl.zeros([TILE_OUT, PART // PER_LOAD], tl.float32)
    for part in tl.static_range(PARTS):
        loaded = _sum_of_loads(xs[part] * weights[0][part].to(tl.float32), PER_LOAD)
        sums += loaded * weights[1][part]
        if GATED:
            up_loaded = _sum_of_loads(xs[part] * ups[0][part].to(tl.float32), PER_LOAD)
            up_sums += up_loaded * ups[1][part]
    outputs = tile * TILE_OUT + tl.arange(0, TILE_OUT)
    out = tl.sum(sums, 1) * scale
    if GATED:
        out = out / (1.0 + tl.exp(-out)) * (tl.sum(up_sums, 1) * scale)
    tl.store(out_ptr + outputs, out.to(out_ptr.dtype.element_ty), mask=outputs < OUTPUTS)


@triton.jit
def _sum_of_loads(x, PER_LOAD: tl.constexpr):
    """[outputs, threads * PER_LOAD] to [outputs, threads]: each thread adds up its own elements."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // PER_LOAD, PER_LOAD]), 2)
