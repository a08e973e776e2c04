"""Which attention backend serves which phase."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch

from nanovllm.kernels.attention.by_phase import ByPhaseBackend
from nanovllm.kernels.attention.interface import AttentionBackend, AttentionShape
from nanovllm.kernels.attention.sdpa import SdpaBackend

# Fastest first, as measured (docs/performance.md).
DECODE_PREFERENCE = ("triton", "flash-attn")
PREFILL_PREFERENCE = ("triton", "flash-attn")


class Chosen(NamedTuple):
    """A backend, what it is called in the log, and whether steps that use it can be captured in
    CUDA graphs."""

    backend: AttentionBackend
    description: str
    capturable: bool


def choose(name: str, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Chosen:
    """The backend called `name`, or for "auto" the fastest that can run.

    Raises ValueError if the one that is named cannot run; the message says why.
    """
    if name == "sdpa" or (name == "auto" and device.type == "cpu"):
        return Chosen(SdpaBackend(shape), "sdpa", capturable=False)
    if name != "auto":
        if reason := _obstacle(name, shape, dtype, device):
            raise ValueError(f"--attention {name} cannot run: {reason}")
        return _by_phase(name, name, shape)
    able = {name for name in ("triton", "flash-attn") if not _obstacle(name, shape, dtype, device)}
    decode = next((name for name in DECODE_PREFERENCE if name in able), None)
    prefill = next((name for name in PREFILL_PREFERENCE if name in able), None)
    if decode is None or prefill is None:
        return Chosen(SdpaBackend(shape), "sdpa", capturable=False)
    return _by_phase(decode, prefill, shape)


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


def _by_phase(decode: str, prefill: str, shape: AttentionShape) -> Chosen:
    backend = ByPhaseBackend(_decode_backend(decode, shape), _prefill_backend(prefill, shape))
    described = decode if decode == prefill else f"{decode} (decode) and {prefill} (prefill)"
    return Chosen(backend, described, capturable=True)


# Imported where they are chosen: on a CPU there is no Triton to import, and it takes its time.


def _decode_backend(name: str, shape: AttentionShape) -> AttentionBackend:
    if name == "flash-attn":
        from nanovllm.kernels.attention.flash import FlashDecodeBackend

        return FlashDecodeBackend(shape)
    from nanovllm.kernels.attention.triton_decode import TritonDecodeBackend

    return TritonDecodeBackend(shape)


def _prefill_backend(name: str, shape: AttentionShape) -> AttentionBackend:
    if name == "flash-attn":
        from nanovllm.kernels.attention.flash import FlashPrefillBackend

        return FlashPrefillBackend(shape)
    from nanovllm.kernels.attention.triton_prefill import TritonPrefillBackend

    return TritonPrefillBackend(shape)
