"""What a decoder layer does besides matrix products and attention, in plain torch.

`FusedOps` in `kernels.layers.fused` does the same on a GPU, with one kernel for each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.attention.interface import LayerCache, store_kv


class LayerOps:
    """The reference. Inputs are contiguous; each op computes in float32 and rounds once."""

    def add_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The residual stream goes on by `x`, and is normalized for what comes next.

        Args:
            x: [T, hidden].
            residual: [T, hidden], or None where the stream begins with `x`.
            weight: [hidden].

        Returns:
            sum / rms(sum) * weight and the sum, which is x's dtype before it is normalized.
        """
        total = x if residual is None else residual + x
        return F.rms_norm(total, weight.shape, weight, eps), total

    def norm_rope_store(
        self,
        qkv: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        eps: float,
        rotation: Tensor,
        cache: LayerCache,
        slot_mapping: Tensor,
    ) -> Tensor:
        """Normalizes and rotates each head's query and key, and stores keys and values.

        Args:
            qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim].
            q_weight, k_weight: [head_dim], of the RMSNorm over each head.
            rotation: float32 [T, head_dim], see `rotate`.
            slot_mapping: int64 [T], see `store_kv`.

        Returns:
            The queries [T, num_heads, head_dim].
        """
        num_kv, dim = cache.k.shape[-2:]
        num = qkv.shape[1] // dim - 2 * num_kv
        heads = qkv.view(len(qkv), num + 2 * num_kv, dim)
        q, k, v = torch.split(heads, [num, num_kv, num_kv], dim=1)
        k = F.rms_norm(k.float(), k_weight.shape, k_weight.float(), eps)
        store_kv(rotate(k, rotation).to(v.dtype), v, cache, slot_mapping)
        q = F.rms_norm(q.float(), q_weight.shape, q_weight.float(), eps)
        return rotate(q, rotation).to(v.dtype)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up [T, 2 * size], gates first. Returns silu(gate) * up [T, size]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate.float()).mul_(up).to(up.dtype)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates x, float32 [T, heads, head_dim], whose halves are the two coordinates.

    Args:
        rotation: float32 [T, head_dim], cosines in its first half and sines in its second.
    """
    cos, sin = rotation[:, None].chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def choose_ops(device: torch.device) -> LayerOps:
    """The fastest that run on `device`."""
    if device.type != "cuda":
        return LayerOps()
    # Imported where it is chosen: on a CPU there is no Triton to import, and it takes its time.
    from nanovllm.kernels.layers.fused import FusedOps

    return FusedOps()
