"""What a decoder layer does besides attention, in plain torch.

`FusedOps` in `kernels.layers.fused` does the same on a GPU, with fewer kernels.

The residual stream goes from layer to layer as two tensors [T, hidden]: `x` and the `residual` that
x has yet to be added to, or None where x is the stream itself. So each op that could add them can
leave it to the next.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.attention.interface import LayerCache, store_kv
from nanovllm.kernels.layers.linear import Norm


class LayerOps:
    """The reference. Inputs are contiguous; each op computes in float32 and rounds once."""

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        """The normalized stream, and the stream, added up and rounded before it is normalized."""
        total = x if residual is None else residual + x
        return F.rms_norm(total, norm.weight.shape, norm.weight, norm.eps), total

    def norm_linear(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm: Norm,
        weight: Tensor,
        bias: Tensor | None,
        gated: bool,
    ) -> tuple[Tensor, Tensor]:
        """The product of the normalized stream with weight [outputs, hidden], and the stream.

        Args:
            gated: the product's first half are gates; returns silu(gate) * up [T, outputs / 2].
        """
        normed, total = self.add_rms_norm(x, residual, norm)
        out = F.linear(normed, weight, bias)
        return self.silu_mul(out) if gated else out, total

    def linear_add(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The stream `residual` with a product of something else, x [T, inputs], on its way into
        it."""
        return F.linear(x, weight, bias), residual

    def norm_rope_store(
        self,
        qkv: Tensor,
        q_norm: Norm | None,
        k_norm: Norm | None,
        rotation: Tensor,
        cache: LayerCache,
        slot_mapping: Tensor,
    ) -> Tensor:
        """Normalizes each head's query and key, rotates both, and stores keys and values.

        Args:
            qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim].
            q_norm, k_norm: over each head, with the same eps; None for both where heads are not
                normalized.
            rotation: float32 [T, head_dim], see `rotate`.
            slot_mapping: int64 [T], see `store_kv`.

        Returns:
            The queries [T, num_heads, head_dim].
        """
        num_kv, dim = cache.k.shape[-2:]
        num = qkv.shape[1] // dim - 2 * num_kv
        heads = qkv.view(len(qkv), num + 2 * num_kv, dim)
        q, k, v = torch.split(heads, [num, num_kv, num_kv], dim=1)
        q, k = _norm_heads(q.float(), q_norm), _norm_heads(k.float(), k_norm)
        store_kv(rotate(k, rotation).to(v.dtype), v, cache, slot_mapping)
        return rotate(q, rotation).to(v.dtype)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up [T, 2 * size], gates first. Returns silu(gate) * up [T, size]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate.float()).mul_(up).to(up.dtype)


def _norm_heads(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else F.rms_norm(x, norm.weight.shape, norm.weight.float(), norm.eps)


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
