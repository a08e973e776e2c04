"""Matrix products of a few rows, with what comes right before and after them: the reference."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Norm(NamedTuple):
    """An RMSNorm: weight [inputs], and what is added to the mean square."""

    weight: Tensor
    eps: float


class Around(NamedTuple):
    """What a product does besides.

    Attributes:
        norm: of its input.
        gated: the weight's first half gives gates, the second what they let pass: silu(gate) * up.
        residual: [T, outputs], added to its output.
    """

    norm: Norm | None = None
    gated: bool = False
    residual: Tensor | None = None


def linear(x: Tensor, weight: Tensor, around: Around) -> Tensor:
    """x [T, inputs], weight [outputs (twice as many where gated), inputs]. Returns [T, outputs] in
    x's dtype, computed in float32 throughout."""
    out = x.float()
    if around.norm is not None:
        out = F.rms_norm(out, weight.shape[1:], around.norm.weight.float(), around.norm.eps)
    out = F.linear(out, weight.float())
    if around.gated:
        gate, up = out.chunk(2, dim=-1)
        out = F.silu(gate) * up
    if around.residual is not None:
        out = out + around.residual
    return out.to(x.dtype)
