"""Rotary position embedding (Su et al., 2021, "RoFormer") and its context extensions.

Only scalings whose frequencies are the same at every length are served: with those that change
as a sequence grows (`dynamic`, `longrope`) the keys already in a cache would not match.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.checkpoint import CheckpointError, ModelConfig, RopeConfig


class RotaryEmbedding:
    """Cosines and sines of every position below `max_model_len`, computed once."""

    def __init__(self, config: ModelConfig, max_model_len: int, device: torch.device) -> None:
        """Raises CheckpointError for a rope type that is not served or lacks a parameter."""
        frequencies, scale = rope_frequencies(config)
        positions = torch.arange(max_model_len, dtype=torch.float32, device=device)
        angles = positions[:, None] * frequencies.to(device)
        self._table = torch.cat((angles.cos(), angles.sin()), dim=-1) * scale

    def __call__(self, positions: Tensor) -> Tensor:
        """Args: positions int64 [T]. Returns float32 [T, head_dim], cosines and then sines."""
        return F.embedding(positions, self._table)


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angular frequencies, float32 [head_dim / 2], and the factor on cosines and sines."""
    rope = config.rope
    try:
        scaled = _SCALINGS[rope.type]
    except KeyError:
        raise CheckpointError(
            f"rope type {rope.type!r} is not served; these are: {', '.join(_SCALINGS)}"
        ) from None
    if rope.partial_rotary_factor not in (None, 1.0):
        raise CheckpointError(
            f"rope partial_rotary_factor {rope.partial_rotary_factor} is not served"
        )
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return scaled(1.0 / rope.rope_theta**exponents, config)


def _required(rope: RopeConfig, name: str) -> float:
    value = getattr(rope, name)
    if value is None:
        raise CheckpointError(f"rope type {rope.type!r} needs {name!r} in config.json")
    return float(value)


def _original_length(config: ModelConfig) -> int:
    return config.rope.original_max_position_embeddings or config.max_position_embeddings


def _default(frequencies: Tensor, config: ModelConfig) -> tuple[Tensor, float]:
    return frequencies, 1.0


def _linear(frequencies: Tensor, config: ModelConfig) -> tuple[Tensor, float]:
    return frequencies / _required(config.rope, "factor"), 1.0


def _llama3(frequencies: Tensor, config: ModelConfig) -> tuple[Tensor, float]:
    """Llama 3.1's: long wavelengths are divided by the factor, short ones kept, and those in
    between interpolated."""
    rope = config.rope
    low = _required(rope, "low_freq_factor")
    high = _required(rope, "high_freq_factor")
    turns = _original_length(config) * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / _required(rope, "factor")), 1.0


def _yarn(frequencies: Tensor, config: ModelConfig) -> tuple[Tensor, float]:
    """YaRN (Peng et al., 2023): dimensions that turn often within the original length keep their
    frequency, those that turn seldom are divided by the factor, with a linear ramp between."""
    rope = config.rope
    original = _original_length(config)
    factor = rope.factor or config.max_position_embeddings / original

    def dimension(turns: float) -> float:
        """The (fractional) pair of dimensions that turns so often within `original` tokens."""
        ratio = math.log(original / (turns * 2 * math.pi)) / math.log(rope.rope_theta)
        return config.head_dim * ratio / 2

    first, last = dimension(rope.beta_fast or 32), dimension(rope.beta_slow or 1)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)
    pairs = torch.arange(config.head_dim // 2, dtype=torch.float32)
    divided = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    scaled = frequencies * (1 - divided) + frequencies / factor * divided
    return scaled, _yarn_attention_factor(rope, factor)


def _yarn_attention_factor(rope: RopeConfig, factor: float) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


_SCALINGS: dict[str, Callable[[Tensor, ModelConfig], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
