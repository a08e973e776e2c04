"""Decode attention of one sequence, with what comes before it: queries and keys are normalized and
rotated, and the newest key and value go to the cache.

As in `triton_decode` a program takes one key/value head and one split of the context. Older keys
and values were stored by earlier steps. So a program loads its first keys and values while the
kernel that computes the queries still runs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nanovllm.kernels.attention.interface import AttentionMetadata, AttentionShape, Parts
from nanovllm.kernels.attention.split_kv import UNUSED
from nanovllm.kernels.layers.ops import Heads
from nanovllm.kernels.overlap import await_previous, launch_next, overlapped

# Query heads of a key/value head: a thread has all of them.
MAX_GROUP = 8
# Elements of a key that a thread loads: 16 bytes in bfloat16.
PER_THREAD = 8


class FusedTuning(NamedTuple):
    """How the decode of one sequence is cut.

    Attributes:
        tile: keys that a program takes at a time; a power of two that divides a block.
        splits: of a context, at most; a power of two.
    """

    tile: int
    warps: int = 2
    splits: int = 64

    def rows(self, head_dim: int) -> int:
        """Rows of threads of a program, see `_attend`."""
        return 32 * self.warps * PER_THREAD // head_dim


def choose_tuning(shape: AttentionShape) -> FusedTuning | None:
    """None where there can be none."""
    group = shape.num_heads // shape.num_kv_heads
    tuning = FusedTuning(math.gcd(64 if group <= MAX_GROUP // 2 else 32, shape.block_size))
    fits = group <= MAX_GROUP and tuning.tile >= tuning.rows(shape.head_dim)
    return tuning if fits else None


def attend(
    heads: Heads, metadata: AttentionMetadata, shape: AttentionShape, tuning: FusedTuning
) -> Parts:
    """Stores the newest key and value, and returns the attention of one token."""
    qkv, q_norm, k_norm, rotation, cache, kv_indices = heads
    length = metadata.cache_seqlens
    size = shape.num_heads, tuning.splits
    parts = Parts(
        torch.empty(*size, shape.head_dim, dtype=qkv.dtype, device=qkv.device),
        torch.empty(size, dtype=torch.float32, device=qkv.device),
        length,
        tuning.tile,
    )
    group = shape.num_heads // shape.num_kv_heads
    rows = tuning.rows(shape.head_dim)
    _attend[(shape.num_kv_heads, tuning.splits)](
        qkv,
        qkv if q_norm is None else q_norm.weight,
        qkv if k_norm is None else k_norm.weight,
        rotation,
        kv_indices,
        *cache,
        parts.out,
        parts.lse,
        metadata.block_tables,
        length,
        shape.head_dim**-0.5 * math.log2(math.e),
        0.0 if q_norm is None else q_norm.eps,
        NORM=q_norm is not None,
        GROUP=group,
        GROUP_PADDED=triton.next_power_of_2(group),
        HEADS=shape.num_kv_heads,
        DIM=shape.head_dim,
        BLOCK=shape.block_size,
        ROWS=rows,
        ROW_KEYS=tuning.tile // rows,
        SPLITS=tuning.splits,
        num_warps=tuning.warps,
        num_stages=1,
        **overlapped(),
    )
    return parts


@triton.jit
def split_size(older, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """Keys of a split of `older` keys, in whole tiles. The first split has the newest key, too."""
    return tl.maximum(tl.cdiv(tl.cdiv(older, SPLITS), TILE), 1) * TILE


@triton.jit
def splits_used(length, SPLITS: tl.constexpr, TILE: tl.constexpr):
    older = tl.maximum(length - 1, 1)
    return tl.cdiv(older, split_size(older, SPLITS, TILE))


@triton.jit
def _attend(
    qkv_ptr,  # [(GROUP + 2) * HEADS, DIM]
    q_weight_ptr,  # [DIM], if NORM
    k_weight_ptr,
    rotation_ptr,  # float32 [DIM]
    kv_index_ptr,  # int64 [1]
    k_ptr,  # [blocks, BLOCK, HEADS, DIM]
    v_ptr,
    split_out_ptr,  # [HEADS * GROUP, SPLITS, DIM]
    lse_ptr,  # [HEADS * GROUP, SPLITS]
    table_ptr,
    length_ptr,
    scale,  # head_dim ** -0.5 * log2(e), since exponentials are powers of two
    eps,
    NORM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    launch_next(OVERLAP)
    head = tl.program_id(0)
    split = tl.program_id(1)
    older = tl.load(length_ptr) - 1
    TILE: tl.constexpr = ROWS * ROW_KEYS
    keys = split_size(older, SPLITS, TILE)
    start = split * keys
    end = tl.minimum(start + keys, older)

    # Tiles are [keys, query heads, ROWS, DIM]. A row is a few threads that lie side by side along
    # DIM. It has keys of its own, and all query heads: rows meet only when all keys are done. Tiles
    # are read and written as [keys, query heads, ROWS * DIM]. Their last dimension takes all
    # threads, so each version of Triton cuts them alike.
    row = tl.arange(0, ROWS)[None, None, :, None]
    place = tl.arange(0, ROWS * DIM)[None, None, :]
    member = tl.arange(0, GROUP_PADDED)[None, :, None]
    half: tl.constexpr = DIM // 2
    # Each row loads what all rows need, so that nothing has to be exchanged.
    own = place % DIM
    # Of each pair, which a head's two halves have, one coordinate and the other.
    other = (place + half) % DIM
    cos = _in_rows(tl.load(rotation_ptr + place % half), ROWS)
    sin = tl.load(rotation_ptr + half + place % half)
    sin = _in_rows(tl.where(own < half, -sin, sin), ROWS)
    if NORM:
        q_weight = _in_rows(tl.load(q_weight_ptr + own), ROWS)
        other_q_weight = _in_rows(tl.load(q_weight_ptr + other), ROWS)
        k_weight = _in_rows(tl.load(k_weight_ptr + own), ROWS)
        other_k_weight = _in_rows(tl.load(k_weight_ptr + other), ROWS)
    kv_index = tl.load(kv_index_ptr)
    k = _tile(k_ptr, table_ptr, start, end, head, HEADS, DIM, BLOCK, ROWS, ROW_KEYS)
    v = _tile(v_ptr, table_ptr, start, end, head, HEADS, DIM, BLOCK, ROWS, ROW_KEYS)
    await_previous(OVERLAP)
    if (split > 0) & (start >= end):
        return  # no keys: the first split has the newest key

    q_ptrs = qkv_ptr + (head * GROUP + member) * DIM
    new_k_ptr = qkv_ptr + (GROUP * HEADS + head) * DIM
    q = _in_rows(tl.load(q_ptrs + own, mask=member < GROUP, other=0.0), ROWS).to(tl.float32)
    other_q = _in_rows(tl.load(q_ptrs + other, mask=member < GROUP, other=0.0), ROWS).to(tl.float32)
    new_k = _in_rows(tl.load(new_k_ptr + own), ROWS).to(tl.float32)
    other_k = _in_rows(tl.load(new_k_ptr + other), ROWS).to(tl.float32)
    new_v = tl.load(new_k_ptr + HEADS * DIM + own)
    if NORM:
        q_inverse = tl.rsqrt(tl.sum(q * q, 3, keep_dims=True) / DIM + eps)
        q *= q_inverse * q_weight.to(tl.float32)
        other_q *= q_inverse * other_q_weight.to(tl.float32)
        k_inverse = tl.rsqrt(tl.sum(new_k * new_k, 3, keep_dims=True) / DIM + eps)
        new_k *= k_inverse * k_weight.to(tl.float32)
        other_k *= k_inverse * other_k_weight.to(tl.float32)
    dtype = k_ptr.dtype.element_ty
    q = (q * cos + other_q * sin).to(dtype).to(tl.float32)
    new_k = (new_k * cos + other_k * sin).to(dtype)
    newest = (kv_index * HEADS + head) * DIM + own
    # The first row of the first split has the newest key and value.
    newest_row = tl.where(split == 0, 1, 0)
    stores = place < newest_row * DIM
    tl.store(k_ptr + newest, tl.reshape(new_k, [1, 1, ROWS * DIM]), mask=stores)
    tl.store(v_ptr + newest, new_v, mask=stores)
    is_newest = row < newest_row
    q *= scale
    new_score = tl.sum(q * new_k.to(tl.float32), 3, keep_dims=True)
    top = tl.where(is_newest, new_score, UNUSED)
    total = tl.where(is_newest, tl.zeros_like(new_score) + 1.0, 0.0)
    new_v = _in_rows(new_v, ROWS).to(tl.float32)
    acc = tl.where(is_newest, tl.zeros_like(q) + new_v, 0.0)

    tile_keys = tl.arange(0, ROW_KEYS)[:, None, None, None] * ROWS + row
    for tile in range(start, end, TILE):
        next_tile = tile + TILE
        next_k = _tile(k_ptr, table_ptr, next_tile, end, head, HEADS, DIM, BLOCK, ROWS, ROW_KEYS)
        scores = tl.sum(q * k.to(tl.float32), 3, keep_dims=True)
        scores = tl.where(tile + tile_keys < end, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 0, keep_dims=True))
        weights = tl.exp2(scores - new_top)
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(weights, 0, keep_dims=True)
        acc = acc * rescale + tl.sum(weights * v.to(tl.float32), 0, keep_dims=True)
        top = new_top
        k = next_k
        # Only now: four tiles at a time would not fit into the registers.
        v = _tile(v_ptr, table_ptr, next_tile, end, head, HEADS, DIM, BLOCK, ROWS, ROW_KEYS)

    joined_top = tl.max(top, 2, keep_dims=True)
    share = tl.exp2(top - joined_top)
    total = tl.sum(total * share, 2, keep_dims=True)
    out = tl.sum(acc * share, 2, keep_dims=True) / total
    member = member[:, :, :, None]
    dims = tl.arange(0, DIM)[None, None, None, :]
    split_rows = (head * GROUP + member) * SPLITS + split
    in_group = member < GROUP
    tl.store(lse_ptr + split_rows, joined_top + tl.log2(total), mask=in_group)
    out = out.to(split_out_ptr.dtype.element_ty)
    tl.store(split_out_ptr + split_rows * DIM + dims, out, mask=in_group)


@triton.jit
def _tile(
    cache_ptr,
    table_ptr,
    start,
    end,
    head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_KEYS: tl.constexpr,
):
    """Keys or values [ROW_KEYS, 1, ROWS, DIM] of the tile from `start` on, which one block has."""
    place = tl.arange(0, ROWS * DIM)[None, None, :]
    key = tl.arange(0, ROW_KEYS)[:, None, None]
    tile_keys = key * ROWS + place // DIM
    inside = start + tile_keys < end
    block = tl.load(table_ptr + start // BLOCK, mask=start < end, other=0).to(tl.int64)
    kv_rows = (block * BLOCK + start % BLOCK + tile_keys) * HEADS + head
    offsets = kv_rows * DIM + place % DIM
    return _in_rows(tl.load(cache_ptr + offsets, mask=inside, other=0.0), ROWS)


@triton.jit
def _in_rows(x, ROWS: tl.constexpr):
    """[keys, query heads, ROWS * DIM] to [keys, query heads, ROWS, DIM]."""
    return tl.reshape(x, [x.shape[0], x.shape[1], ROWS, x.shape[2] // ROWS])
