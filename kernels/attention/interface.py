"""Attention over a paged KV cache: the one interface that every backend has.

A batch is ragged. Each of its n sequences has q_len >= 1 query tokens, which stand at the end of a
context of ctx_len >= q_len tokens, all of whose keys and values are in the cache (those of the
query tokens are stored first). A whole prompt, a chunk of one, a prompt after a prefix-cache hit
and a decode (q_len 1) are thus the same case. Decodes come first in the batch, since backends
treat them apart.

    batch = backend.prepare(metadata)      # once a step: what all layers share
    batch.store(k, v, cache)               # in each layer
    out = batch.forward(q, cache)

The cache of a layer is `[num_blocks, block_size, num_kv_heads, head_dim]` for keys and the same
for values, heads being those of this TP rank. It must start as finite numbers (zeros): positions
past a context may be read, and masked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

NOWHERE = -1
"""The slot of a token whose key and value are not stored (padding)."""


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

    Attributes:
        num_decodes: sequences [0, num_decodes) are decodes; a one-token chunk may be among the
            rest as well.
        query_lens: host, int32 [n].
        context_lens: host, int32 [n]; query tokens included.
        cu_seqlens_q: device, int32 [n + 1]; sequence i has the rows from [i] up to [i + 1].
        cache_seqlens: device, int32 [n]; `context_lens`.
        block_tables: device, int32 [n, max_blocks]; entries past a context are not used, but must
            name a block (0, say).
        slot_mapping: device, int64 [T]; where each query token's key and value go:
            block * block_size + offset, or NOWHERE.
    """

    num_decodes: int
    query_lens: NDArray[np.int32]
    context_lens: NDArray[np.int32]
    cu_seqlens_q: Tensor
    cache_seqlens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor


class AttentionBatch(ABC):
    """One step's batch, as its backend has prepared it; serves all layers."""

    @abstractmethod
    def store(self, k: Tensor, v: Tensor, cache: LayerCache) -> None:
        """Writes the query tokens' keys and values, each [T, num_kv_heads, head_dim], into the
        cache at the batch's slot mapping."""

    @abstractmethod
    def forward(self, q: Tensor, cache: LayerCache) -> Tensor:
        """Causal attention of q [T, num_heads, head_dim], scaled by head_dim ** -0.5, over each
        sequence's context. Returns the same shape and dtype."""


class AttentionBackend(ABC):
    """Makes batches; holds nothing that belongs to a single step."""

    def __init__(self, shape: AttentionShape) -> None:
        self.shape = shape

    @abstractmethod
    def prepare(self, metadata: AttentionMetadata) -> AttentionBatch:
        """What all layers of a step share. Raises ValueError if this backend cannot serve it."""
