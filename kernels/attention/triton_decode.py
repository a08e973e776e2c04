"""Paged decode attention in Triton: split-KV, with the query heads of a KV head in one tile.

One program has one sequence, one key/value head and one part of the context, and computes softmax
and weighted sum over that part online (Milakov and Gimelshein, 2018). A decode reads each key and
value once and does little with it, so that all that counts is to have enough bytes in flight.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention.device import Device
from nanovllm.kernels.attention.interface import (
    AttentionBackend,
    AttentionBatch,
    AttentionMetadata,
    AttentionShape,
    LayerCache,
)
from nanovllm.kernels.attention.parts import MOST_PARTS, Parts
from nanovllm.kernels.overlap import await_previous, begin, overlapped

# tl.dot takes no fewer rows.
MIN_ROWS = 16


class Tuning(NamedTuple):
    """How a decode is cut up.

    Attributes:
        tile: tokens that a program takes at a time.
        programs_per_processor: contexts are split until there are so many.
    """

    tile: int = 64
    warps: int = 4
    stages: int = 2
    programs_per_processor: int = 4


class TritonDecodeBackend(AttentionBackend):
    """Decodes only. Any block size that is a multiple of 16."""

    def __init__(self, shape: AttentionShape, tuning: Tuning | None = None) -> None:
        super().__init__(shape)
        self._tuning = tuning or Tuning()
        self._processors = Device.current().processors

    def prepare(self, metadata: AttentionMetadata) -> AttentionBatch:
        most_tiles = -(-int(metadata.context_lens.max()) // self._tuning.tile)
        wanted = self._processors * self._tuning.programs_per_processor
        programs = metadata.num_decodes * self.shape.num_kv_heads
        splits = max(1, min(wanted // programs, most_tiles, MOST_PARTS))
        return _Decodes(self.shape, self._tuning, splits, metadata)


class _Decodes(AttentionBatch):
    def __init__(
        self, shape: AttentionShape, tuning: Tuning, splits: int, metadata: AttentionMetadata
    ) -> None:
        self._shape = shape
        self._tuning = tuning
        self._splits = splits
        self._metadata = metadata
        self._parts: Parts | None = None
        if splits > 1:
            device = metadata.cache_seqlens.device
            self._parts = Parts.of(metadata.num_decodes, shape, splits, device)

    def write(self, q: Tensor, cache: LayerCache, out: Tensor) -> None:
        group = self._shape.num_heads // self._shape.num_kv_heads
        _decode[(self._metadata.num_decodes, self._shape.num_kv_heads, self._splits)](
            q,
            cache.k,
            cache.v,
            out,
            *(self._parts or (out, out)),
            self._metadata.block_tables,
            self._metadata.cache_seqlens,
            self._metadata.block_tables.stride(0),
            self._shape.head_dim**-0.5 * math.log2(math.e),
            SPLIT=self._splits > 1,
            GROUP=group,
            ROWS=max(MIN_ROWS, triton.next_power_of_2(group)),
            HEADS=self._shape.num_kv_heads,
            DIM=self._shape.head_dim,
            BLOCK=self._shape.block_size,
            TILE=self._tuning.tile,
            num_warps=self._tuning.warps,
            num_stages=self._tuning.stages,
            **overlapped(),
        )
        if self._parts is not None:
            self._parts.join(out)


@triton.jit
def _decode(
    q_ptr,  # [n, HEADS * GROUP, DIM]
    k_ptr,  # [blocks, BLOCK, HEADS, DIM]
    v_ptr,
    out_ptr,  # as q
    parts_ptr,  # see Parts
    logs_ptr,
    tables_ptr,
    lengths_ptr,
    table_stride,
    scale,  # of the scores, in base 2
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    length = tl.load(lengths_ptr + sequence)
    each = tl.cdiv(tl.cdiv(length, splits), TILE) * TILE
    start = split * each
    end = tl.minimum(start + each, length)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    tokens = tl.arange(0, TILE)
    heads = sequence * (HEADS * GROUP) + head * GROUP + rows
    in_group = rows[:, None] < GROUP
    await_previous(OVERLAP)
    q = tl.load(q_ptr + heads[:, None] * DIM + dims[None, :], mask=in_group, other=0.0)

    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIM], tl.float32)
    table = tables_ptr + sequence.to(tl.int64) * table_stride
    for first in range(start, end, TILE):
        positions = first + tokens
        inside = positions < end
        if BLOCK % TILE == 0:
            block = tl.load(table + first // BLOCK).to(tl.int64)
            slots = block * BLOCK + first % BLOCK + tokens
        else:
            blocks = tl.load(table + positions // BLOCK, mask=inside, other=0).to(tl.int64)
            slots = blocks * BLOCK + positions % BLOCK
        offsets = (slots * HEADS + head)[:, None] * DIM + dims[None, :]
        k = tl.load(k_ptr + offsets, mask=inside[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_most = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - new_most[:, None])
        shrink = tl.exp2(most - new_most)
        v = tl.load(v_ptr + offsets, mask=inside[:, None], other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        most = new_most

    if not SPLIT:
        result = mixed / total[:, None]
        tl.store(
            out_ptr + heads[:, None] * DIM + dims[None, :],
            result.to(out_ptr.dtype.element_ty),
            mask=in_group,
        )
    else:
        # A part beyond a short context has no tokens: its weight is zero, and it is not read.
        parts = heads * splits + split
        total = tl.where(start < end, total, 1.0)
        logs = tl.where(start < end, most + tl.log2(total), float("-inf"))
        tl.store(logs_ptr + parts, logs, mask=rows < GROUP)
        tl.store(
            parts_ptr + parts[:, None] * DIM + dims[None, :],
            mixed / total[:, None],
            mask=rows[:, None] < tl.where(start < end, GROUP, 0),
        )
