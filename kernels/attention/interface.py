"""Attention over a paged KV cache: the interface of all backends.

A batch is ragged. Each of its n sequences has q_len >= 1 query tokens at the end of a context of
ctx_len >= q_len tokens. All keys and values of the context are in the cache; those of the query
tokens are stored before attention runs. A whole prompt, a prefill chunk, a prompt after a
prefix-cache hit and a decode (q_len 1) are thus the same case. Decodes come first in a batch, since
backends may treat them apart.

    batch = backend.prepare(metadata)      # once a step, for all layers
    store_kv(k, v, cache, kv_indices)    # in each layer, or a kernel that does the same
    out = batch.forward(q, cache)

The cache of a layer is `[num_blocks, block_size, num_kv_heads, head_dim]` for keys and the same for
values; heads are those of this TP rank. The cache must start with finite numbers (zeros), since a
backend may read positions past a context before it masks them. The Triton kernels bear any value
there, even NaN.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class LayerCache(NamedTuple):
    """One layer's keys and values: each [num_blocks, block_size, num_kv_heads, head_dim]."""

    k: Tensor
    v: Tensor


class AttentionShape(NamedTuple):
    """Heads of this TP rank, and the block size of the cache."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """A batch of n sequences with T query tokens; the first `num_decodes` have q_len 1 each.

    Lengths are given twice: on the host, to choose kernels and shapes before the step, and on the
    device, for the kernels. Neither is read back.

    A captured step is replayed with many batches; all backends but sdpa take such steps. In them
    lengths on the host are upper bounds, sequences after the decodes may have neither query tokens
    nor a context, and the last rows may be padding, whose result is undefined.

    Attributes:
        num_decodes: sequences [0, num_decodes) are decodes. A prefill chunk of one token may be
            among the others.
        query_lens: host, int32 [n].
        context_lens: host, int32 [n]; query tokens included.
        cu_seqlens_q: device, int32 [n + 1]; sequence i has query rows [i] up to [i + 1].
        cache_seqlens: device, int32 [n]; `context_lens`.
        block_tables: device, int32 [n, max_blocks]; entries past a context are unused, but must
            name a block.
    """

    num_decodes: int
    query_lens: NDArray[np.int32]
    context_lens: NDArray[np.int32]
    cu_seqlens_q: Tensor
    cache_seqlens: Tensor
    block_tables: Tensor

    def decodes(self) -> AttentionMetadata:
        """The decodes of the batch."""
        d = self.num_decodes
        return AttentionMetadata(
            num_decodes=d,
            query_lens=self.query_lens[:d],
            context_lens=self.context_lens[:d],
            cu_seqlens_q=self.cu_seqlens_q[: d + 1],
            cache_seqlens=self.cache_seqlens[:d],
            block_tables=self.block_tables[:d],
        )

    def prefills(self) -> AttentionMetadata:
        """The batch without its decodes: query rows from `num_decodes` on."""
        d = self.num_decodes
        return AttentionMetadata(
            num_decodes=0,
            query_lens=self.query_lens[d:],
            context_lens=self.context_lens[d:],
            cu_seqlens_q=self.cu_seqlens_q[d:] - d,
            cache_seqlens=self.cache_seqlens[d:],
            block_tables=self.block_tables[d:],
        )


class Parts(NamedTuple):
    """Attention of one token, over splits of its context that are yet to be joined.

    Attributes:
        out: [heads, splits, head_dim], attention over each split alone; undefined if unused.
        lse: float32 [heads, splits], log2 of each split's sum of exponentials; likewise.
        length: int32 [1], of the context.
        tile: a split is a multiple of so many keys.
    """

    out: Tensor
    lse: Tensor
    length: Tensor
    tile: int

    def join(self) -> Tensor:
        """[1, heads * head_dim], in plain torch."""
        # As in `fused_decode`: the first split has the newest key, beside its share of the others.
        older = max(int(self.length) - 1, 1)
        tiles = math.ceil(math.ceil(older / self.out.shape[1]) / self.tile)
        used = math.ceil(older / (tiles * self.tile))
        shares = torch.softmax(self.lse[:, :used] * math.log(2), dim=-1)[..., None]
        return (self.out[:, :used].float() * shares).sum(1).to(self.out.dtype).view(1, -1)


class AttentionBatch(ABC):
    """A step's batch, prepared for all layers."""

    def forward(self, q: Tensor, cache: LayerCache) -> Tensor:
        """Causal attention of q [T, num_heads, head_dim], scaled by head_dim ** -0.5, over each
        sequence's context. Returns the same shape and dtype."""
        out = torch.empty_like(q)
        self.write(q, cache, out)
        return out

    @abstractmethod
    def write(self, q: Tensor, cache: LayerCache, out: Tensor) -> None:
        """As `forward`; writes the result to `out`, which is contiguous."""


class AttentionBackend(ABC):
    """Prepares batches; has no state of a single step."""

    def __init__(self, shape: AttentionShape) -> None:
        self.shape = shape

    @abstractmethod
    def prepare(self, metadata: AttentionMetadata) -> AttentionBatch:
        """Prepares a step's batch. Raises ValueError if the backend cannot take it."""


def store_kv(k: Tensor, v: Tensor, cache: LayerCache, kv_indices: Tensor) -> None:
    """Writes keys and values, each [T, num_kv_heads, head_dim], into the cache.

    Args:
        kv_indices: int64 [T], each token's index in the cache: block * block_size + offset.
    """
    cache.k.flatten(0, 1)[kv_indices] = k
    cache.v.flatten(0, 1)[kv_indices] = v
