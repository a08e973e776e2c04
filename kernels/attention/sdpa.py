"""The reference backend: torch's scaled_dot_product_attention (SDPA), on any device.

Decodes gather their context through the block table, and attend together in groups of similar
length, padded and masked. Prefills attend one sequence at a time. Keys and values are never copied
for the query heads that share them. The backend needs exact lengths on the host, so CUDA graphs
cannot capture a step that uses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nanovllm.kernels.attention.interface import (
    AttentionBackend,
    AttentionBatch,
    AttentionMetadata,
    AttentionShape,
    LayerCache,
)

# The most elements of keys that a group of decodes gathers: 2 MiB in float32, so that they stay in
# a CPU's cache until they are used, and malloc keeps their memory.
GATHER_ELEMENTS = 1 << 19
# Query rows that attend at once after a cached prefix; bounds the mask's memory.
QUERY_TILE = 512


class SdpaBackend(AttentionBackend):
    """See the module's docstring."""

    def prepare(self, metadata: AttentionMetadata) -> AttentionBatch:
        return _SdpaBatch(self.shape, metadata)


class _Decodes(NamedTuple):
    """g decodes that attend together.

    Attributes:
        rows: int64 [g], their query rows.
        kv_indices: int64 [g * context], where in the cache each decode's context is, padded to
            the longest among them.
        mask: bool [g, 1, 1, context], or None if all contexts are equally long.
    """

    rows: Tensor
    kv_indices: Tensor
    mask: Tensor | None


class _Prefill(NamedTuple):
    """One sequence: query rows [start, end), and the indices int64 [context] of its context in the
    cache."""

    start: int
    end: int
    context: int
    kv_indices: Tensor


class _SdpaBatch(AttentionBatch):
    def __init__(self, shape: AttentionShape, metadata: AttentionMetadata) -> None:
        self.shape = shape
        lengths = metadata.context_lens[: metadata.num_decodes]
        self.decodes = [self._group(rows, metadata) for rows in group_by_length(lengths, shape)]
        ends = list(accumulate(metadata.query_lens.tolist()))
        self.prefills = [
            self._prefill_of(i, ends[i], metadata) for i in range(metadata.num_decodes, len(ends))
        ]

    def _prefill_of(self, row: int, end: int, metadata: AttentionMetadata) -> _Prefill:
        context = int(metadata.context_lens[row])
        lengths = metadata.cache_seqlens[row : row + 1]
        return _Prefill(
            start=end - int(metadata.query_lens[row]),
            end=end,
            context=context,
            kv_indices=self._kv_indices(metadata.block_tables[row : row + 1], lengths, context),
        )

    def _kv_indices(self, block_tables: Tensor, lengths: Tensor, context: int) -> Tensor:
        """The indices in the cache of the first `context` tokens of each row of `block_tables`
        int32 [g, max_blocks]: int64 [g * context]. Rows whose `lengths` int32 [g] are less repeat
        their last token: values of others, though masked, may be NaN, and 0 * NaN is NaN.

        Tokens are gathered, not blocks, since most of a large block may be unused.
        """
        size = self.shape.block_size
        positions = torch.arange(context, device=block_tables.device)
        positions = torch.minimum(positions, lengths[:, None].long() - 1)
        return (block_tables.gather(1, positions // size) * size + positions % size).view(-1)

    def _group(self, rows: NDArray[np.int64], metadata: AttentionMetadata) -> _Decodes:
        lengths = metadata.context_lens[rows]
        context = int(lengths.max())
        row_ids = torch.from_numpy(rows).to(metadata.block_tables.device)
        mask = None
        if lengths.min() < context:
            positions = torch.arange(context, dtype=torch.int32, device=row_ids.device)
            mask = (positions < metadata.cache_seqlens[row_ids, None])[:, None, None]
        tables = metadata.block_tables.index_select(0, row_ids)
        return _Decodes(
            row_ids, self._kv_indices(tables, metadata.cache_seqlens[row_ids], context), mask
        )

    def write(self, q: Tensor, cache: LayerCache, out: Tensor) -> None:
        for group in self.decodes:
            out[group.rows] = self._decode(q[group.rows], group, cache)
        for sequence in self.prefills:
            rows = slice(sequence.start, sequence.end)
            self._prefill(q[rows], sequence, cache, out[rows])

    def _decode(self, q: Tensor, group: _Decodes, cache: LayerCache) -> Tensor:
        """q and the result: [g, num_heads, head_dim]."""
        # The query heads of a key/value head take the dimension of SDPA's query positions.
        grouped = q.view(len(group.rows), self.shape.num_kv_heads, -1, self.shape.head_dim)
        k, v = (
            held.flatten(0, 1)
            .index_select(0, group.kv_indices)
            .view(len(group.rows), -1, *held.shape[2:])
            .transpose(1, 2)
            for held in cache
        )
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=group.mask)
        return out.reshape(q.shape)

    def _prefill(self, q: Tensor, sequence: _Prefill, cache: LayerCache, out: Tensor) -> None:
        """q and out: [q_len, num_heads, head_dim]."""
        kv_heads = self.shape.num_kv_heads
        per_kv_head = self.shape.num_heads // kv_heads
        # [num_kv_heads, query heads of each, tokens, head_dim]; keys and values are expanded along
        # the second dimension without a copy.
        grouped = q.view(len(q), kv_heads, per_kv_head, -1).permute(1, 2, 0, 3)
        k, v = (
            held.flatten(0, 1)
            .index_select(0, sequence.kv_indices)
            .transpose(0, 1)[:, None]
            .expand(-1, per_kv_head, -1, -1)
            for held in cache
        )
        result = out.view(len(q), kv_heads, per_kv_head, -1).permute(1, 2, 0, 3)
        before = sequence.context - len(q)
        if before == 0:
            result.copy_(F.scaled_dot_product_attention(grouped, k, v, is_causal=True))
            return
        for start in range(0, len(q), QUERY_TILE):
            end = min(start + QUERY_TILE, len(q))
            seen = before + end
            mask = torch.ones(end - start, seen, dtype=torch.bool, device=q.device)
            result[:, :, start:end] = F.scaled_dot_product_attention(
                grouped[:, :, start:end],
                k[:, :, :seen],
                v[:, :, :seen],
                attn_mask=mask.tril(before + start),
            )


def group_by_length(
    lengths: NDArray[np.int32], shape: AttentionShape
) -> Iterator[NDArray[np.int64]]:
    """Groups of indices into `lengths` [n]. Lengths of a group are within a factor of two, and its
    padded keys have at most GATHER_ELEMENTS elements, unless it has one member."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        most = max(1, GATHER_ELEMENTS // (longest * shape.num_kv_heads * shape.head_dim))
        candidates = lengths[order[start : start + most]]
        size = int(np.count_nonzero(candidates * 2 >= longest))
        yield order[start : start + size]
        start += size
