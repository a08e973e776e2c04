"""Attention over a paged KV cache: the one interface that every backend has.

A batch is ragged. Each of its n sequences has q_len >= 1 query tokens, which stand at the end of a
context of ctx_len >= q_len tokens, all of whose keys and values are in the cache (those of the
query tokens are stored first). A whole prompt, a chunk of one, a prompt after a prefix-cache hit
and a decode (q_len 1) are thus the same case. Decodes come first in the batch, since backends
treat them apart.

    batch = backend.prepare(metadata)      # once a step: what all layers share
    store_kv(k, v, cache, slot_mapping)    # in each layer, or a kernel that does so
    out = batch.forward(q, cache)

The cache of a layer is `[num_blocks, block_size, num_kv_heads, head_dim]` for keys and the same
for values, heads being those of this TP rank. It must start as finite numbers (zeros): positions
past a context may be read, and masked. The Triton kernels bear anything there, NaN included.
"""

from __future__ import annotations

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
    """What a backend is built for; heads are those of this TP rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """A batch of n sequences with T query tokens; the first `num_decodes` have q_len 1 each.

    Lengths are given twice: on the host, where they are known before the step and choose kernels
    and shapes, and on the device, for the kernels themselves. Neither is ever read back.

    A captured step, which only the reference does not take, is replayed with many batches. There
    lengths on the host are bounds, sequences past the decodes may have neither query tokens nor a
    context, and the last rows may be nobody's: what comes out for those is anything.

    Attributes:
        num_decodes: sequences [0, num_decodes) are decodes; a one-token chunk may be among the
            rest as well.
        query_lens: host, int32 [n].
        context_lens: host, int32 [n]; query tokens included.
        cu_seqlens_q: device, int32 [n + 1]; sequence i has the rows from [i] up to [i + 1].
        cache_seqlens: device, int32 [n]; `context_lens`.
        block_tables: device, int32 [n, max_blocks]; entries past a context are not used, but must
            name a block (0, say).
    """

    num_decodes: int
    query_lens: NDArray[np.int32]
    context_lens: NDArray[np.int32]
    cu_seqlens_q: Tensor
    cache_seqlens: Tensor
    block_tables: Tensor

    def decodes(self) -> AttentionMetadata:
        """The decodes alone."""
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
        """All but the decodes; their first query token is row `num_decodes` of the batch."""
        d = self.num_decodes
        return AttentionMetadata(
            num_decodes=0,
            query_lens=self.query_lens[d:],
            context_lens=self.context_lens[d:],
            cu_seqlens_q=self.cu_seqlens_q[d:] - d,
            cache_seqlens=self.cache_seqlens[d:],
            block_tables=self.block_tables[d:],
        )


class AttentionBatch(ABC):
    """One step's batch, as its backend has prepared it; serves all layers."""

    def forward(self, q: Tensor, cache: LayerCache) -> Tensor:
        """Causal attention of q [T, num_heads, head_dim], scaled by head_dim ** -0.5, over each
        sequence's context. Returns the same shape and dtype."""
        out = torch.empty_like(q)
        self.write(q, cache, out)
        return out

    @abstractmethod
    def write(self, q: Tensor, cache: LayerCache, out: Tensor) -> None:
        """The same, written to `out`, which is contiguous."""


class AttentionBackend(ABC):
    """Makes batches; holds nothing that belongs to a single step."""

    def __init__(self, shape: AttentionShape) -> None:
        self.shape = shape

    @abstractmethod
    def prepare(self, metadata: AttentionMetadata) -> AttentionBatch:
        """What all layers of a step share. Raises ValueError if this backend cannot serve it."""


def store_kv(k: Tensor, v: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
    """Writes keys and values, each [T, num_kv_heads, head_dim], into the cache.

    Args:
        slot_mapping: int64 [T], where each goes: block * block_size + offset.
    """
    cache.k.flatten(0, 1)[slot_mapping] = k
    cache.v.flatten(0, 1)[slot_mapping] = v
