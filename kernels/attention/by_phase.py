"""Decodes by one backend, prefills by another: what is fastest at one need not be at the other."""

from __future__ import annotations

from torch import Tensor

from nanovllm.kernels.attention.interface import (
    AttentionBackend,
    AttentionBatch,
    AttentionMetadata,
    LayerCache,
)


class ByPhaseBackend(AttentionBackend):
    """Gives each backend batches of its own phase only."""

    def __init__(self, decode: AttentionBackend, prefill: AttentionBackend) -> None:
        super().__init__(decode.shape)
        self._decode = decode
        self._prefill = prefill

    def prepare(self, metadata: AttentionMetadata) -> AttentionBatch:
        if metadata.num_decodes == len(metadata.query_lens):
            return self._decode.prepare(metadata)
        prefills = self._prefill.prepare(metadata.prefills())
        if not metadata.num_decodes:
            return prefills
        decodes = self._decode.prepare(metadata.decodes())
        return _MixedBatch(metadata.num_decodes, decodes, prefills)


class _MixedBatch(AttentionBatch):
    def __init__(self, num_decodes: int, decodes: AttentionBatch, prefills: AttentionBatch) -> None:
        self._num_decodes = num_decodes
        self._decodes = decodes
        self._prefills = prefills

    def write(self, q: Tensor, cache: LayerCache, out: Tensor) -> None:
        d = self._num_decodes
        self._decodes.write(q[:d], cache, out[:d])
        self._prefills.write(q[d:], cache, out[d:])
