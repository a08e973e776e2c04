"""Attention by the flash-attn package (Dao, 2023, "FlashAttention-2"), over block tables."""

from __future__ import annotations

import torch
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from torch import Tensor

from nanovllm.kernels.attention.interface import (
    AttentionBackend,
    AttentionBatch,
    AttentionMetadata,
    LayerCache,
)


class FlashDecodeBackend(AttentionBackend):
    """Takes decodes only."""

    def prepare(self, metadata: AttentionMetadata) -> AttentionBatch:
        return _Decodes(metadata)


class FlashPrefillBackend(AttentionBackend):
    """Takes prefills only."""

    def prepare(self, metadata: AttentionMetadata) -> AttentionBatch:
        return _Prefills(metadata)


class _Decodes(AttentionBatch):
    def __init__(self, metadata: AttentionMetadata) -> None:
        self._metadata = metadata

    def write(self, q: Tensor, cache: LayerCache, out: Tensor) -> None:
        result: Tensor = flash_attn_with_kvcache(
            q[:, None],
            cache.k,
            cache.v,
            cache_seqlens=self._metadata.cache_seqlens,
            block_table=self._metadata.block_tables,
            causal=True,
        )
        out.copy_(result.squeeze(1))


class _Prefills(AttentionBatch):
    def __init__(self, metadata: AttentionMetadata) -> None:
        self._metadata = metadata
        ends = metadata.cache_seqlens.cumsum(0, dtype=torch.int32)
        self._cu_seqlens_k = torch.nn.functional.pad(ends, (1, 0))

    def write(self, q: Tensor, cache: LayerCache, out: Tensor) -> None:
        metadata = self._metadata
        result: Tensor = flash_attn_varlen_func(
            q,
            cache.k,
            cache.v,
            cu_seqlens_q=metadata.cu_seqlens_q,
            cu_seqlens_k=self._cu_seqlens_k,
            max_seqlen_q=int(metadata.query_lens.max()),
            max_seqlen_k=int(metadata.context_lens.max()),
            causal=True,
            block_table=metadata.block_tables,
        )
        out.copy_(result)
