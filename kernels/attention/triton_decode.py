"""Paged decode attention in Triton: split-KV, with all query heads of a key/value head in one tile.

A program takes one sequence, one key/value head and one split of the context, and computes an
online softmax over that split (Milakov and Gimelshein, 2018, "Online normalizer calculation for
softmax"). A decode reads each key and value once and computes little with it, so its speed is that
of memory: enough bytes must be in flight.
"""

from __future__ import annotations

import math
from functools import cached_property

import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention.fused_decode import FusedTuning, choose_tuning
from nanovllm.kernels.attention.interface import (
    AttentionBackend,
    AttentionBatch,
    AttentionMetadata,
    AttentionShape,
    LayerCache,
)
from nanovllm.kernels.attention.split_kv import MAX_SPLITS, SplitResults
from nanovllm.kernels.attention.tuning import DecodeTuning, Gpu
from nanovllm.kernels.overlap import await_previous, launch_next, overlapped

# The fewest rows that tl.dot takes.
MIN_ROWS = 16


class TritonDecodeBackend(AttentionBackend):
    """Takes decodes only, with any block size that is a multiple of 16."""

    def __init__(self, shape: AttentionShape, tuning: DecodeTuning | None = None) -> None:
        super().__init__(shape)
        self._tuning = tuning or DecodeTuning()
        self._processors = Gpu.current().processors

    def prepare(self, metadata: AttentionMetadata) -> AttentionBatch:
        max_tiles = -(-int(metadata.context_lens.max()) // self._tuning.tile)
        wanted = self._processors * self._tuning.programs_per_processor
        programs = metadata.num_decodes * self.shape.num_kv_heads
        splits = max(1, min(wanted // programs, max_tiles, MAX_SPLITS))
        fused = choose_tuning(self.shape) if metadata.num_decodes == 1 else None
        return Decodes(self.shape, self._tuning, splits, metadata, fused)


class Decodes(AttentionBatch):
    """Decodes alone, or those of a mixed batch. `fused` is how one decode is cut, see
    `fused_decode`."""

    def __init__(
        self,
        shape: AttentionShape,
        tuning: DecodeTuning,
        splits: int,
        metadata: AttentionMetadata,
        fused: FusedTuning | None,
    ) -> None:
        self.metadata = metadata
        self.shape = shape
        self.fused = fused
        self._tuning = tuning
        self._splits = splits

    @cached_property
    def _split_results(self) -> SplitResults | None:
        if self._splits == 1:
            return None
        device = self.metadata.cache_seqlens.device
        return SplitResults.empty(self.metadata.num_decodes, self.shape, self._splits, device)

    def write(self, q: Tensor, cache: LayerCache, out: Tensor) -> None:
        group = self.shape.num_heads // self.shape.num_kv_heads
        _decode[(self.metadata.num_decodes, self.shape.num_kv_heads, self._splits)](
            q,
            cache.k,
            cache.v,
            out,
            *(self._split_results or (out, out)),
            self.metadata.block_tables,
            self.metadata.cache_seqlens,
            self.metadata.block_tables.stride(0),
            self.shape.head_dim**-0.5 * math.log2(math.e),
            SPLIT=self._splits > 1,
            GROUP=group,
            ROWS=max(MIN_ROWS, triton.next_power_of_2(group)),
            HEADS=self.shape.num_kv_heads,
            DIM=self.shape.head_dim,
            BLOCK=self.shape.block_size,
            TILE=self._tuning.tile,
            num_warps=self._tuning.warps,
            num_stages=self._tuning.stages,
            **overlapped(),
        )
        if self._split_results is not None:
            self._split_results.combine(out)


@triton.jit
def _decode(
    q_ptr,  # [n, HEADS * GROUP, DIM]
    k_ptr,  # [blocks, BLOCK, HEADS, DIM]
    v_ptr,
    out_ptr,  # as q
    split_out_ptr,  # see SplitResults; used where SPLIT
    lse_ptr,
    tables_ptr,
    lengths_ptr,
    table_stride,
    scale,  # head_dim ** -0.5 * log2(e), since exponentials are powers of two
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    launch_next(OVERLAP)
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    length = tl.load(lengths_ptr + sequence)
    split_keys = tl.cdiv(tl.cdiv(length, splits), TILE) * TILE
    start = split * split_keys
    end = tl.minimum(start + split_keys, length)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    tokens = tl.arange(0, TILE)
    heads = sequence * (HEADS * GROUP) + head * GROUP + rows
    in_group = rows[:, None] < GROUP
    await_previous(OVERLAP)
    q = tl.load(q_ptr + heads[:, None] * DIM + dims[None, :], mask=in_group, other=0.0)

    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    table = tables_ptr + sequence.to(tl.int64) * table_stride
    for first in range(start, end, TILE):
        positions = first + tokens
        inside = positions < end
        if BLOCK % TILE == 0:
            block = tl.load(table + first // BLOCK).to(tl.int64)
            kv_indices = block * BLOCK + first % BLOCK + tokens
        else:
            blocks = tl.load(table + positions // BLOCK, mask=inside, other=0).to(tl.int64)
            kv_indices = blocks * BLOCK + positions % BLOCK
        offsets = (kv_indices * HEADS + head)[:, None] * DIM + dims[None, :]
        k = tl.load(k_ptr + offsets, mask=inside[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        v = tl.load(v_ptr + offsets, mask=inside[:, None], other=0.0)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        row_max = new_max

    if not SPLIT:
        out = acc / row_sum[:, None]
        tl.store(
            out_ptr + heads[:, None] * DIM + dims[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=in_group,
        )
    else:
        # A split beyond the end of a short context has no keys. Its lse of -inf gives it no weight.
        split_rows = heads * splits + split
        row_sum = tl.where(start < end, row_sum, 1.0)
        lse = tl.where(start < end, row_max + tl.log2(row_sum), float("-inf"))
        tl.store(lse_ptr + split_rows, lse, mask=rows < GROUP)
        tl.store(
            split_out_ptr + split_rows[:, None] * DIM + dims[None, :],
            acc / row_sum[:, None],
            mask=rows[:, None] < tl.where(start < end, GROUP, 0),
        )
