"""torch's own `varlen_attn` over block tables (torch 2.12 and later): FlashAttention-2 within it.

It has not been run: no machine with a GPU and such a torch was at hand. So it is used only where it
is named.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from nanovllm.kernels.attention.interface import (
    AttentionBackend,
    AttentionBatch,
    AttentionMetadata,
    LayerCache,
)

CAUSAL = (-1, 0)


class VarlenBackend(AttentionBackend):
    """Any batch: a decode is a sequence of one query token."""

    def prepare(self, metadata: AttentionMetadata) -> AttentionBatch:
        return _Batch(metadata)


class _Batch(AttentionBatch):
    def __init__(self, metadata: AttentionMetadata) -> None:
        self._metadata = metadata

    def write(self, q: Tensor, cache: LayerCache, out: Tensor) -> None:
        metadata = self._metadata
        found = varlen_attn(
            q,
            cache.k,
            cache.v,
            metadata.cu_seqlens_q,
            None,
            int(metadata.query_lens.max()),
            int(metadata.context_lens.max()),
            window_size=CAUSAL,
            enable_gqa=True,
            seqused_k=metadata.cache_seqlens,
            block_table=metadata.block_tables,
        )
        if not isinstance(found, Tensor):
            raise TypeError("varlen_attn returned more than it was asked for")
        out.copy_(found)
