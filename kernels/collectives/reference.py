"""What the collectives of `peers` compute, in plain torch, from the parts of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.layers.ops import Norm


def add_rms_norm(
    parts: Sequence[Tensor], residual: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor]:
    """As `LayerOps.add_rms_norm`, where x is the sum of the ranks' parts [T, hidden]. The sum is
    float32, in the order of the ranks, and rounded once."""
    total = torch.stack([part.float() for part in parts]).sum(0)
    if residual is not None:
        total += residual
    total = total.to(parts[0].dtype)
    normed = F.rms_norm(total.float(), norm.weight.shape, norm.weight.float(), norm.eps)
    return normed.to(total.dtype), total


def all_gather(parts: Sequence[Tensor]) -> Tensor:
    """The ranks' parts [rows, columns] side by side: [rows, ranks * columns]."""
    return torch.cat(list(parts), dim=-1)
