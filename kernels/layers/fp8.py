"""Weights in FP8, as Qwen's checkpoints have them, in plain torch; `fp8_gemm` has GEMMs for a GPU.

A weight is e4m3 with one scale for each block of 128 x 128 values. A GEMM of several rows quantizes
its inputs too, with one scale for each 128 neighbouring inputs of a row (DeepSeek-AI, 2024,
"DeepSeek-V3 Technical Report", section 3.3). A GEMM of one row takes the inputs as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
# Products with it are the same on every device; quotients by a number are not.
INVERSE_MAX = 1 / FP8_MAX


class Fp8Weight(NamedTuple):
    """A weight [outputs, inputs], both multiples of `BLOCK`.

    Attributes:
        values: e4m3 [outputs, inputs].
        scales: float32 [outputs / BLOCK, inputs / BLOCK]; a weight is its value times the scale of
            its block.
    """

    values: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        return self.values.device

    @classmethod
    def empty(cls, outputs: int, inputs: int, device: torch.device) -> Fp8Weight:
        """Uninitialized."""
        blocks = inputs // BLOCK
        # cuBLAS takes scales whose rows begin at a multiple of 4.
        scales = torch.empty(outputs // BLOCK, -(-blocks // 4) * 4, device=device)
        return cls(torch.empty(outputs, inputs, dtype=FP8, device=device), scales[:, :blocks])

    def copy_(self, other: Fp8Weight) -> None:
        self.values.copy_(other.values)
        self.scales.copy_(other.scales)


class Fp8Rows(NamedTuple):
    """Inputs of a GEMM: values e4m3 [T, inputs], and scales float32 [T, inputs / BLOCK]."""

    values: Tensor
    scales: Tensor


def quantize(weight: Tensor) -> Fp8Weight:
    """The weight's blocks, each scaled so that its greatest value is e4m3's."""
    outputs, inputs = weight.shape
    blocks = weight.float().view(outputs // BLOCK, BLOCK, inputs // BLOCK, BLOCK)
    scales = _scales(blocks.abs().amax(dim=(1, 3)))
    values = (blocks / scales[:, None, :, None]).to(FP8)
    return Fp8Weight(values.view(outputs, inputs), scales)


def dequantize(weight: Fp8Weight) -> Tensor:
    """float32 [outputs, inputs]."""
    outputs, inputs = weight.values.shape
    blocks = weight.values.float().view(outputs // BLOCK, BLOCK, inputs // BLOCK, BLOCK)
    return (blocks * weight.scales[:, None, :, None]).view(outputs, inputs)


def quantize_rows(x: Tensor) -> Fp8Rows:
    """x [T, inputs]."""
    rows, inputs = x.shape
    groups = x.float().view(rows, inputs // BLOCK, BLOCK)
    scales = _scales(groups.abs().amax(dim=2))
    return Fp8Rows((groups * (1 / scales[..., None])).to(FP8).view(rows, inputs), scales)


def dequantize_rows(x: Fp8Rows) -> Tensor:
    """float32 [T, inputs]."""
    groups = x.values.float().view(*x.scales.shape, BLOCK)
    return (groups * x.scales[..., None]).flatten(1)


def _scales(greatest: Tensor) -> Tensor:
    return torch.where(greatest > 0, greatest * INVERSE_MAX, 1.0)
