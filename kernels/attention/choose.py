"""Which attention backend runs."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.attention.interface import (
    AttentionBackend,
    AttentionBatch,
    AttentionMetadata,
    AttentionShape,
    LayerCache,
)
from nanovllm.kernels.attention.sdpa import SdpaBackend

# Fastest first, as measured (docs/performance.md). Both decode and prefill.
GPU_BACKENDS = ("triton", "flash-attn")


class Chosen(NamedTuple):
    """A backend.

    Attributes:
        description: its name in the log.
        capturable: whether CUDA graphs can capture steps that use it.
    """

    backend: AttentionBackend
    description: str
    capturable: bool


def choose(name: str, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Chosen:
    """The backend called `name`, or for "auto" the fastest that can run.

    Raises ValueError, which says why, if the named backend cannot run.
    """
    for candidate in GPU_BACKENDS:
        if name in (candidate, "auto"):
            obstacle = _obstacle(candidate, shape, dtype, device)
            if obstacle is None:
                return Chosen(_gpu_backend(candidate, shape), candidate, capturable=True)
            if name == candidate:
                raise ValueError(f"--attention {name} cannot run: {obstacle}")
    return Chosen(SdpaBackend(shape), "sdpa", capturable=False)


def _obstacle(
    name: str, shape: AttentionShape, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why a backend cannot run, or None."""
    if device.type != "cuda":
        return f"it needs a GPU, and the device is a {device.type}"
    if name == "triton":
        if shape.block_size % 16:
            return f"--kvcache-block-size {shape.block_size} is no multiple of 16"
        if shape.head_dim < 16 or shape.head_dim & (shape.head_dim - 1):
            return f"head_dim {shape.head_dim} is no power of two from 16"
        return None
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if shape.block_size % 256:
        return f"--kvcache-block-size {shape.block_size} is no multiple of 256"
    if shape.head_dim % 8 or shape.head_dim > 256:
        return f"head_dim {shape.head_dim} is no multiple of 8 up to 256"
    return None


def _gpu_backend(name: str, shape: AttentionShape) -> AttentionBackend:
    # Imported where they are chosen: a CPU may have no Triton, and importing it is slow.
    if name == "flash-attn":
        from nanovllm.kernels.attention.flash import FlashDecodeBackend, FlashPrefillBackend

        return ByPhaseBackend(FlashDecodeBackend(shape), FlashPrefillBackend(shape))
    from nanovllm.kernels.attention.triton_decode import TritonDecodeBackend
    from nanovllm.kernels.attention.triton_prefill import TritonPrefillBackend

    return ByPhaseBackend(TritonDecodeBackend(shape), TritonPrefillBackend(shape))


class ByPhaseBackend(AttentionBackend):
    """Cuts a batch in two: decodes for one backend, prefills for another."""

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
