"""The layer operations of `ops` in Triton.

They compute next to nothing with what they read. A prefill's speed is that of memory: each byte is
read and written once. A decode's speed depends on the number of kernels: with few rows, norms,
gates and residual sums are fused into the GEMVs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention.fused_decode import attend
from nanovllm.kernels.attention.interface import AttentionBatch, Parts
from nanovllm.kernels.attention.triton_decode import Decodes
from nanovllm.kernels.layers import fp8_gemm, fp8_normed, gemv, joined
from nanovllm.kernels.layers.fp8 import Fp8Weight
from nanovllm.kernels.layers.ops import Embedding, Fusion, Heads, LayerOps, Norm, Weight, whole
from nanovllm.kernels.overlap import await_previous, launch_next, overlapped

# Elements of a row for each thread: 16 bytes in bfloat16.
PER_THREAD = 8
MAX_WARPS = 16
# A program of `_norm_rope_store` takes this many heads of one token, with this many warps.
HEADS = 8
HEADS_WARPS = 4
# Of a vocabulary's logits, with few inputs and with many.
HEAD_TUNING = gemv.GemvTuning(2, 2)
LARGE_HEAD_TUNING = gemv.GemvTuning(1, 8)
# A program of `_silu_mul` takes this many elements.
SILU_TILE = 1024


class FusedOps(LayerOps):
    """For CUDA tensors."""

    def embed(
        self, token_ids: Tensor, positions: Tensor, embedding: Embedding
    ) -> tuple[Tensor, Tensor]:
        weight, first, rotations = embedding
        tokens, size, dim = len(token_ids), weight.shape[1], rotations.shape[1]
        x = weight.new_empty(tokens, size)
        rotation = rotations.new_empty(tokens, dim)
        _embed[(tokens,)](
            token_ids,
            positions,
            weight,
            rotations,
            x,
            rotation,
            first,
            len(weight),
            SIZE=size,
            PADDED=triton.next_power_of_2(size),
            DIM=dim,
            PADDED_DIM=triton.next_power_of_2(dim),
            num_warps=_warps(size),
            **overlapped(),
        )
        return x, rotation

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        normed = torch.empty_like(x)
        total = x if residual is None else torch.empty_like(x)
        size = x.shape[1]
        _add_rms_norm[(len(x),)](
            x,
            x if residual is None else residual,
            norm.weight,
            normed,
            total,
            norm.eps,
            ADD=residual is not None,
            SIZE=size,
            PADDED=triton.next_power_of_2(size),
            num_warps=_warps(size),
            **overlapped(),
        )
        return normed, total

    def fuses_norm(self, rows: int, weight: Weight, bias: Tensor | None, gated: bool) -> bool:
        return bias is None and _tuning(rows, weight, gated) is not None

    def norm_linear(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm: Norm,
        weight: Weight,
        bias: Tensor | None,
        gated: bool,
    ) -> tuple[Tensor, Tensor]:
        tuning = _tuning(len(x), weight, gated)
        if residual is not None or bias is not None or tuning is None:
            return super().norm_linear(x, residual, norm, weight, bias, gated)
        normed = fp8_normed.choose_tuning(len(x), weight, gated)
        if normed is not None and isinstance(weight, Fp8Weight):
            return fp8_normed.normed_linear(x, norm, weight, gated, normed), x
        return gemv.linear(x, weight, Fusion(norm, gated), tuning), x

    def gemm(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        if not isinstance(weight, Fp8Weight):
            return super().gemm(x, weight, bias)
        tuning = _tuning(len(x), weight, gated=False)
        if tuning is None:
            out = _fp8_linear(x, weight, gated=False)
        else:
            out = gemv.linear(x, weight, Fusion(), tuning)
        return out if bias is None else out.add_(bias)

    def linear(
        self, x: Tensor | Parts, weight: Weight, bias: Tensor | None, gated: bool = False
    ) -> Tensor:
        if isinstance(x, Parts):
            return joined.linear(x, whole(weight), None)
        tuning = _tuning(len(x), weight, gated)
        if bias is not None or tuning is None:
            if (
                gated
                and bias is None
                and isinstance(weight, Fp8Weight)
                and len(x) <= fp8_gemm.MAX_ROWS
            ):
                return _fp8_linear(x, weight, gated)
            return super().linear(x, weight, bias, gated)
        return gemv.linear(x, weight, Fusion(gated=gated), tuning)

    def linear_add(
        self, x: Tensor | Parts, weight: Weight, bias: Tensor | None, residual: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(x, Parts):
            return joined.linear(x, whole(weight), residual), None
        tuning = _tuning(len(x), weight, gated=False)
        if bias is not None or tuning is None:
            return super().linear_add(x, weight, bias, residual)
        return gemv.linear(x, weight, Fusion(residual=residual), tuning), None

    def joins(self, weight: Weight, bias: Tensor | None) -> bool:
        return bias is None and not isinstance(weight, Fp8Weight) and joined.fits(weight)

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        # Nothing else has been measured with so many outputs.
        if len(hidden) > 1:
            return super().logits(hidden, weight, out)
        tuning = HEAD_TUNING if hidden.shape[1] <= gemv.SMALL else LARGE_HEAD_TUNING
        return gemv.linear(hidden, weight, Fusion(), tuning, out)

    def norm_rope_store(self, heads: Heads) -> Tensor:
        num, num_kv, dim = heads.sizes
        if dim < 2 or dim & (dim - 1):
            return super().norm_rope_store(heads)
        qkv, q_norm, k_norm, rotation, cache, kv_indices = heads
        q = torch.empty(len(qkv), num, dim, dtype=qkv.dtype, device=qkv.device)
        _norm_rope_store[(len(qkv), triton.cdiv(num + 2 * num_kv, HEADS))](
            qkv,
            qkv if q_norm is None else q_norm.weight,
            qkv if k_norm is None else k_norm.weight,
            rotation,
            kv_indices,
            q,
            cache.k,
            cache.v,
            0.0 if q_norm is None else q_norm.eps,
            NORM=q_norm is not None,
            NUM=num,
            NUM_KV=num_kv,
            HALF=dim // 2,
            HEADS=HEADS,
            num_warps=HEADS_WARPS,
            **overlapped(),
        )
        return q

    def attend(self, heads: Heads, batch: AttentionBatch, joins: bool) -> Tensor | Parts:
        if not joins or not isinstance(batch, Decodes) or batch.fused is None:
            return super().attend(heads, batch, joins)
        return attend(heads, batch.metadata, batch.shape, batch.fused)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        size = gate_up.shape[1] // 2
        out = torch.empty(len(gate_up), size, dtype=gate_up.dtype, device=gate_up.device)
        _silu_mul[(len(gate_up), triton.cdiv(size, SILU_TILE))](
            gate_up,
            out,
            SIZE=size,
            TILE=SILU_TILE,
            num_warps=SILU_TILE // (32 * PER_THREAD),
            **overlapped(),
        )
        return out


def _warps(size: int) -> int:
    """For a program that takes a row of this size."""
    return int(min(max(triton.next_power_of_2(size) // (32 * PER_THREAD), 1), MAX_WARPS))


def _fp8_linear(x: Tensor, weight: Fp8Weight, gated: bool) -> Tensor:
    outputs, inputs = weight.values.shape
    rows = fp8_gemm.quantize_rows(x)
    tuning = fp8_gemm.choose_tuning(len(x), inputs, outputs, gated)
    if tuning is None:
        return fp8_gemm.linear_of_many(rows, len(x), weight, x.dtype)
    return fp8_gemm.linear(rows, len(x), weight, x.dtype, gated, tuning)


def _tuning(rows: int, weight: Weight, gated: bool) -> gemv.GemvTuning | None:
    if isinstance(weight, Fp8Weight):
        return gemv.choose_fp8_tuning(rows, weight.values.shape[1], gated)
    outputs, inputs = weight.shape
    return gemv.choose_tuning(rows, inputs, outputs // 2 if gated else outputs, gated)


@triton.jit(do_not_specialize=["first", "shard"])
def _embed(
    token_ids_ptr,
    positions_ptr,
    weight_ptr,  # [shard, SIZE]
    rotations_ptr,  # float32 [positions, DIM]
    x_ptr,  # [tokens, SIZE]
    rotation_ptr,  # float32 [tokens, DIM]
    first,
    shard,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # The next kernel does not start before this one ends, see `kernels.overlap`.
    await_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(token_ids_ptr + token) - first
    position = tl.load(positions_ptr + token)
    columns = tl.arange(0, PADDED)
    known = tl.where((row >= 0) & (row < shard), SIZE, 0)
    x = tl.load(weight_ptr + row * SIZE + columns, mask=columns < known, other=0.0)
    dims = tl.arange(0, PADDED_DIM)
    is_dim = dims < DIM
    rotation = tl.load(rotations_ptr + position * DIM + dims, mask=is_dim, other=0.0)
    tl.store(x_ptr + token * SIZE + columns, x, mask=columns < SIZE)
    tl.store(rotation_ptr + token * DIM + dims, rotation, mask=is_dim)


@triton.jit
def _add_rms_norm(
    x_ptr,  # [rows, SIZE]
    residual_ptr,
    weight_ptr,  # [SIZE]
    normed_ptr,
    total_ptr,  # [rows, SIZE], written where ADD
    eps,
    ADD: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    launch_next(OVERLAP)
    columns = tl.arange(0, PADDED)
    present = columns < SIZE
    offsets = tl.program_id(0).to(tl.int64) * SIZE + columns
    weight = tl.load(weight_ptr + columns, mask=present, other=0.0).to(tl.float32)
    await_previous(OVERLAP)
    total = tl.load(x_ptr + offsets, mask=present, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(residual_ptr + offsets, mask=present, other=0.0).to(tl.float32)
        rounded = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offsets, rounded, mask=present)
        total = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(total * total, 0) / SIZE + eps)
    normed = total * inverse * weight
    tl.store(normed_ptr + offsets, normed.to(normed_ptr.dtype.element_ty), mask=present)


@triton.jit
def _norm_rope_store(
    qkv_ptr,  # [tokens, NUM + 2 * NUM_KV, 2 * HALF]
    q_weight_ptr,  # [2 * HALF], read where NORM
    k_weight_ptr,
    rotation_ptr,  # float32 [tokens, 2 * HALF]
    kv_indices_ptr,  # int64 [tokens], where in the cache keys and values go
    q_ptr,  # [tokens, NUM, 2 * HALF]
    k_ptr,  # [blocks * block_size, NUM_KV, 2 * HALF]
    v_ptr,
    eps,
    NORM: tl.constexpr,
    NUM: tl.constexpr,
    NUM_KV: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    launch_next(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    kv_index = tl.load(kv_indices_ptr + token)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pairs = tl.arange(0, HALF)[None, :]
    is_q = heads < NUM
    is_k = (heads >= NUM) & (heads < NUM + NUM_KV)
    is_v = (heads >= NUM + NUM_KV) & (heads < NUM + 2 * NUM_KV)

    if NORM:
        first_q_weight = tl.load(q_weight_ptr + pairs).to(tl.float32)
        second_q_weight = tl.load(q_weight_ptr + HALF + pairs).to(tl.float32)
        first_k_weight = tl.load(k_weight_ptr + pairs).to(tl.float32)
        second_k_weight = tl.load(k_weight_ptr + HALF + pairs).to(tl.float32)
    cos = tl.load(rotation_ptr + token * (2 * HALF) + pairs)
    sin = tl.load(rotation_ptr + token * (2 * HALF) + HALF + pairs)

    await_previous(OVERLAP)
    offsets = (token * (NUM + 2 * NUM_KV) + heads) * (2 * HALF) + pairs
    present = heads < NUM + 2 * NUM_KV
    first = tl.load(qkv_ptr + offsets, mask=present, other=0.0).to(tl.float32)
    second = tl.load(qkv_ptr + offsets + HALF, mask=present, other=0.0).to(tl.float32)
    x, y = first, second
    if NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        inverse = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        x = first * inverse * tl.where(is_q, first_q_weight, first_k_weight)
        y = second * inverse * tl.where(is_q, second_q_weight, second_k_weight)
    dtype = q_ptr.dtype.element_ty
    rotated_first = (x * cos - y * sin).to(dtype)
    rotated_second = (y * cos + x * sin).to(dtype)

    q_offsets = (token * NUM + heads) * (2 * HALF) + pairs
    tl.store(q_ptr + q_offsets, rotated_first, mask=is_q)
    tl.store(q_ptr + q_offsets + HALF, rotated_second, mask=is_q)
    k_offsets = (kv_index * NUM_KV + heads - NUM) * (2 * HALF) + pairs
    tl.store(k_ptr + k_offsets, rotated_first, mask=is_k)
    tl.store(k_ptr + k_offsets + HALF, rotated_second, mask=is_k)
    v_offsets = (kv_index * NUM_KV + heads - NUM - NUM_KV) * (2 * HALF) + pairs
    tl.store(v_ptr + v_offsets, first.to(dtype), mask=is_v)
    tl.store(v_ptr + v_offsets + HALF, second.to(dtype), mask=is_v)


@triton.jit
def _silu_mul(
    gate_up_ptr,  # [rows, 2 * SIZE]
    out_ptr,  # [rows, SIZE]
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    launch_next(OVERLAP)
    await_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    present = columns < SIZE
    gate_ptr = gate_up_ptr + row * (2 * SIZE) + columns
    gate = tl.load(gate_ptr, mask=present, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + SIZE, mask=present, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * SIZE + columns, out.to(out_ptr.dtype.element_ty), mask=present)
