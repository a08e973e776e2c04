"""The paged KV cache's size and allocation."""

from __future__ import annotations

import math

import numpy as np
import torch

from nanovllm.checkpoint import ModelConfig
from nanovllm.kernels.attention.interface import AttentionShape, LayerCache
from nanovllm.services.gpu_worker.model.parallel import TensorParallel, local_heads


def attention_shape(config: ModelConfig, tp: TensorParallel, block_size: int) -> AttentionShape:
    """What this rank's attention backend is built for."""
    heads = local_heads(config, tp)
    return AttentionShape(heads.num, heads.num_kv, config.head_dim, block_size)


def block_bytes(config: ModelConfig, shape: AttentionShape, dtype: torch.dtype) -> int:
    """Bytes that one block takes on this rank, keys and values of all layers together."""
    per_token = 2 * config.num_hidden_layers * shape.num_kv_heads * shape.head_dim
    return per_token * shape.block_size * dtype.itemsize


def allocate_kv_cache(
    config: ModelConfig,
    shape: AttentionShape,
    num_blocks: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[LayerCache]:
    """Zeros for every layer: `num_blocks` blocks and a spare one, which no sequence gets; see
    `kernels.attention.interface` for the layout."""
    size = (num_blocks + 1, shape.block_size, shape.num_kv_heads, shape.head_dim)
    return [
        LayerCache(k=_zeros(size, dtype, device), v=_zeros(size, dtype, device))
        for _ in range(config.num_hidden_layers)
    ]


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    # NumPy's zeros are the system's, and take memory only where they are written.
    untouched = np.zeros(math.prod(size) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(untouched).view(dtype).view(size)
