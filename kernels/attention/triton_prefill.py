"""Paged prefill attention in Triton: causal, over ragged batches with any context before them.

One program has a tile of one sequence's query tokens and one query head, and goes over the keys
that any of them sees, with an online softmax (Dao et al., 2022, "FlashAttention").
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention.interface import (
    AttentionBackend,
    AttentionBatch,
    AttentionMetadata,
    AttentionShape,
    LayerCache,
)

QUERY_TILE = 64
KEY_TILE = 64


class TritonPrefillBackend(AttentionBackend):
    """Any batch, but made for prefills. Any block size that is a multiple of 16."""

    def prepare(self, metadata: AttentionMetadata) -> AttentionBatch:
        return _Prefills(self.shape, metadata)


class _Prefills(AttentionBatch):
    def __init__(self, shape: AttentionShape, metadata: AttentionMetadata) -> None:
        self._shape = shape
        self._metadata = metadata
        self._tiles = -(-int(metadata.query_lens.max()) // QUERY_TILE)

    def forward(self, q: Tensor, cache: LayerCache) -> Tensor:
        out = torch.empty_like(q)
        shape, metadata = self._shape, self._metadata
        # The last tiles see the longest contexts, so they go first.
        _prefill[(self._tiles, shape.num_heads, len(metadata.query_lens))](
            q,
            cache.k,
            cache.v,
            out,
            metadata.block_tables,
            metadata.cu_seqlens_q,
            metadata.cache_seqlens,
            metadata.block_tables.stride(0),
            shape.head_dim**-0.5 * math.log2(math.e),
            GROUP=shape.num_heads // shape.num_kv_heads,
            HEADS=shape.num_kv_heads,
            DIM=shape.head_dim,
            BLOCK=shape.block_size,
            QUERIES=QUERY_TILE,
            KEYS=KEY_TILE,
            num_warps=4,
            num_stages=2,
        )
        return out


@triton.jit
def _prefill(
    q_ptr,  # [tokens, HEADS * GROUP, DIM]
    k_ptr,  # [blocks, BLOCK, HEADS, DIM]
    v_ptr,
    out_ptr,
    tables_ptr,
    starts_ptr,
    lengths_ptr,
    table_stride,
    scale,  # of the scores, in base 2
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    start = tl.load(starts_ptr + sequence)
    queries = tl.load(starts_ptr + sequence + 1) - start
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    if first_query >= queries:
        return
    before = tl.load(lengths_ptr + sequence) - queries
    rows = first_query + tl.arange(0, QUERIES)
    dims = tl.arange(0, DIM)
    present = rows < queries
    q_offsets = ((start + rows).to(tl.int64) * (HEADS * GROUP) + head)[:, None] * DIM + dims[None]
    q = tl.load(q_ptr + q_offsets, mask=present[:, None], other=0.0)

    most = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, DIM], tl.float32)
    table = tables_ptr + sequence.to(tl.int64) * table_stride
    end = before + tl.minimum(first_query + QUERIES, queries)
    for first in range(0, end, KEYS):
        positions = first + tl.arange(0, KEYS)
        inside = positions < end
        blocks = tl.load(table + positions // BLOCK, mask=inside, other=0).to(tl.int64)
        slots = blocks * BLOCK + positions % BLOCK
        offsets = (slots * HEADS + head // GROUP)[:, None] * DIM + dims[None, :]
        k = tl.load(k_ptr + offsets, mask=inside[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        # Every row sees position 0, so no maximum stays infinite.
        scores = tl.where(positions[None, :] <= before + rows[:, None], scores, float("-inf"))
        new_most = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - new_most[:, None])
        shrink = tl.exp2(most - new_most)
        v = tl.load(v_ptr + offsets, mask=inside[:, None], other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        most = new_most
    result = mixed / total[:, None]
    tl.store(out_ptr + q_offsets, result.to(out_ptr.dtype.element_ty), mask=present[:, None])
