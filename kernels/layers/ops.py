"""The layer operations besides attention, in plain torch; `FusedOps` has the same for a GPU.

The residual stream goes from layer to layer as two tensors [T, hidden]: `x`, and the `residual` to
which x has yet to be added, or None where x is the whole stream. So an operation that could add
them may leave the sum to the next one, which can fuse it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.attention.interface import AttentionBatch, LayerCache, Parts, store_kv
from nanovllm.kernels.layers.fp8 import BLOCK, Fp8Weight, dequantize

Weight = Tensor | Fp8Weight
"""[outputs, inputs]."""


def whole(weight: Weight) -> Tensor:
    """The weight as one tensor."""
    return dequantize(weight) if isinstance(weight, Fp8Weight) else weight


def split(weight: Weight, sizes: list[int]) -> Sequence[Weight]:
    """Views of so many outputs each, in FP8 multiples of `BLOCK`."""
    if not isinstance(weight, Fp8Weight):
        return torch.split(weight, sizes)
    scales = torch.split(weight.scales, [size // BLOCK for size in sizes])
    return [*map(Fp8Weight, torch.split(weight.values, sizes), scales)]


class Norm(NamedTuple):
    """An RMSNorm: its weight [inputs], and the eps that it adds to the mean square."""

    weight: Tensor
    eps: float


class Heads(NamedTuple):
    """The projections of T tokens to queries, keys and values, and what becomes of them.

    Attributes:
        qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim].
        q_norm, k_norm: over each head, with the same eps; None for both where heads are not
            normalized.
        rotation: float32 [T, head_dim], see `rotate`.
        cache, kv_indices: where keys and values are stored, see `store_kv`.
    """

    qkv: Tensor
    q_norm: Norm | None
    k_norm: Norm | None
    rotation: Tensor
    cache: LayerCache
    kv_indices: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Query heads, key/value heads, and head_dim."""
        num_kv, dim = self.cache.k.shape[-2:]
        return self.qkv.shape[1] // dim - 2 * num_kv, num_kv, dim


class Embedding(NamedTuple):
    """The rows [shard, hidden] that a rank has of the embedding, of the token ids from `first` on,
    and the rotations float32 [positions, head_dim], see `rotate`."""

    weight: Tensor
    first: int
    rotations: Tensor


class Fusion(NamedTuple):
    """What is fused into a GEMM.

    Attributes:
        norm: normalizes the input.
        gated: the output is silu(gate) * up, where the weight's first half gives gate and its
            second half up.
        residual: [T, outputs], is added to the output.
    """

    norm: Norm | None = None
    gated: bool = False
    residual: Tensor | None = None


def fused_linear(x: Tensor, weight: Weight, fusion: Fusion) -> Tensor:
    """The reference of `gemv.linear`: a GEMM with what is fused into it, all in float32.

    Args:
        x: [T, inputs].
        weight: [outputs, inputs], twice as many outputs where gated.

    Returns:
        [T, outputs] in x's dtype.
    """
    out = x.float()
    if fusion.norm is not None:
        out = F.rms_norm(out, out.shape[1:], fusion.norm.weight.float(), fusion.norm.eps)
    out = F.linear(out, whole(weight).float())
    if fusion.gated:
        gate, up = out.chunk(2, dim=-1)
        out = F.silu(gate) * up
    if fusion.residual is not None:
        out = out + fusion.residual
    return out.to(x.dtype)


class LayerOps:
    """The reference. Inputs are contiguous. Each operation computes in float32 and rounds once."""

    def embed(
        self, token_ids: Tensor, positions: Tensor, embedding: Embedding
    ) -> tuple[Tensor, Tensor]:
        """The embeddings [T, hidden] of tokens int64 [T], zeros for those of other ranks, and the
        rotations float32 [T, head_dim] of positions int64 [T]."""
        rows = token_ids - embedding.first
        elsewhere = (rows < 0) | (rows >= len(embedding.weight))
        x = F.embedding(rows.masked_fill_(elsewhere, 0), embedding.weight)
        x = x.masked_fill_(elsewhere[:, None], 0)
        return x, F.embedding(positions, embedding.rotations)

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        """Returns the normalized stream, and the stream itself, rounded before it is normalized."""
        total = x if residual is None else residual + x
        return F.rms_norm(total, norm.weight.shape, norm.weight, norm.eps), total

    def gemm(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """x [T, inputs] times the weight [outputs, inputs]."""
        return F.linear(x, whole(weight).to(x.dtype), bias)

    def fuses_norm(self, rows: int, weight: Weight, bias: Tensor | None, gated: bool) -> bool:
        """Whether `norm_linear` of so many rows without a residual is one kernel."""
        return False

    def norm_linear(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm: Norm,
        weight: Weight,
        bias: Tensor | None,
        gated: bool,
    ) -> tuple[Tensor, Tensor]:
        """Normalizes the stream and projects it.

        Args:
            weight: [outputs, hidden].
            gated: the projection's first half are gates; the result is silu(gate) * up.

        Returns:
            The projection [T, outputs], half as wide where gated, and the stream.
        """
        normed, total = self.add_rms_norm(x, residual, norm)
        return self.linear(normed, weight, bias, gated), total

    def linear(
        self, x: Tensor | Parts, weight: Weight, bias: Tensor | None, gated: bool = False
    ) -> Tensor:
        """Projects x [T, inputs], gated as by `norm_linear`, or what `attend` returned."""
        out = self.gemm(_joined(x), weight, bias)
        return self.silu_mul(out) if gated else out

    def linear_add(
        self, x: Tensor | Parts, weight: Weight, bias: Tensor | None, residual: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As `linear`, to be added to the stream `residual`. Returns the stream."""
        return self.gemm(_joined(x), weight, bias), residual

    def joins(self, weight: Weight, bias: Tensor | None) -> bool:
        """Whether a projection by this weight should get its input in parts."""
        return False

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        """hidden [T, inputs] times weight [vocab, inputs]: [T, vocab], in `out` if given, which is
        contiguous."""
        return torch.mm(hidden, weight.t(), out=out)

    def norm_rope_store(self, heads: Heads) -> Tensor:
        """Normalizes each head's query and key, rotates both, and stores keys and values. Returns
        the queries [T, num_heads, head_dim]."""
        num, num_kv, dim = heads.sizes
        each = heads.qkv.view(-1, num + 2 * num_kv, dim)
        q, k, v = torch.split(each, [num, num_kv, num_kv], dim=1)
        q, k = _norm_heads(q.float(), heads.q_norm), _norm_heads(k.float(), heads.k_norm)
        store_kv(rotate(k, heads.rotation).to(v.dtype), v, heads.cache, heads.kv_indices)
        return rotate(q, heads.rotation).to(v.dtype)

    def attend(self, heads: Heads, batch: AttentionBatch, joins: bool) -> Tensor | Parts:
        """As `norm_rope_store`. Returns the attention [T, num_heads * head_dim], or parts of it, if
        the projection after it `joins` them."""
        return batch.forward(self.norm_rope_store(heads), heads.cache).flatten(1)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up [T, 2 * size], gates first. Returns silu(gate) * up [T, size]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate.float()).mul_(up).to(up.dtype)


def _joined(x: Tensor | Parts) -> Tensor:
    return x.join() if isinstance(x, Parts) else x


def _norm_heads(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else F.rms_norm(x, norm.weight.shape, norm.weight.float(), norm.eps)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Applies rotary position embeddings (Su et al., 2021, "RoFormer").

    Args:
        x: float32 [T, heads, head_dim]; its halves are the two coordinates of each pair.
        rotation: float32 [T, head_dim], cosines in its first half and sines in its second.
    """
    cos, sin = rotation[:, None].chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def choose_ops(device: torch.device) -> LayerOps:
    """The fastest operations that run on `device`."""
    if device.type != "cuda":
        return LayerOps()
    # Imported where it is chosen: a CPU may have no Triton, and importing it is slow.
    from nanovllm.kernels.layers.fused import FusedOps

    return FusedOps()


def has_fp8(device: torch.device) -> bool:
    """Whether `choose_ops(device)` takes FP8 weights: of GPUs, Hopper's cuBLAS has their scales."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
