"""FP8 weights and their GEMMs against the reference; on a CPU, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nanovllm.kernels.layers import fp8_gemm, gemv
from nanovllm.kernels.layers.fp8 import (
    BLOCK,
    FP8_MAX,
    INVERSE_MAX,
    Fp8Weight,
    dequantize,
    dequantize_rows,
    quantize,
)
from nanovllm.kernels.layers.fp8 import quantize_rows as reference_rows
from nanovllm.kernels.layers.fused import FusedOps
from nanovllm.kernels.layers.gemv import GemvTuning
from nanovllm.kernels.layers.ops import Fusion, Norm, fused_linear, split

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")


def random(*shape: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=DEVICE)


def exact(rows: int, inputs: int) -> Tensor:
    """Inputs that e4m3 holds exactly: Triton's interpreter rounds others wrongly."""
    x = (random(rows, inputs) * 4).round().clamp(-8, 8) * 8
    x[:, ::BLOCK] = FP8_MAX
    return x


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_a_block_keeps_its_greatest_value_and_three_bits_of_the_others() -> None:
    weight = random(2 * BLOCK, 3 * BLOCK) * torch.logspace(-6, 3, 3 * BLOCK, device=DEVICE)
    weight[:BLOCK, :BLOCK] = 0
    quantized = quantize(weight)
    blocks = weight.view(2, BLOCK, 3, BLOCK)
    greatest = blocks.abs().amax((1, 3))
    assert torch.equal(quantized.scales, torch.where(greatest > 0, greatest * INVERSE_MAX, 1.0))
    off = (dequantize(quantized) - weight).view_as(blocks).abs()
    steps = quantized.scales[:, None, :, None] * 2.0**-10  # half of e4m3's least
    assert (off <= torch.maximum(blocks.abs() * 2.0**-4 * 1.001, steps)).all()


@pytest.mark.parametrize("rows", [1, 3])
def test_gemv(rows: int) -> None:
    x, norm = random(rows, 3 * BLOCK), Norm(random(3 * BLOCK), 1e-6)
    for fusion in (Fusion(), Fusion(norm, gated=True, residual=random(rows, 2 * BLOCK))):
        weight = quantize(random((1 + fusion.gated) * 2 * BLOCK, 3 * BLOCK))
        found = gemv.linear(x, weight, fusion, GemvTuning(2, 1))
        assert error(found, fused_linear(x, weight, fusion)) < 1e-5


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("splits", [1, 4])
def test_gemm(splits: int, gated: bool) -> None:
    if gated and splits > 1:
        pytest.skip("a gate needs the whole sum")
    x = exact(5, 6 * BLOCK)
    weight = quantize(random((1 + gated) * 2 * BLOCK, 6 * BLOCK))
    tuning = fp8_gemm.GemmTuning(16, 64, splits, 4, 2)
    for _ in range(2):  # the second finds what the first has left
        rows = fp8_gemm.quantize_rows(x)
        found = fp8_gemm.linear(rows, len(x), weight, x.dtype, gated, tuning)
        assert error(found, fused_linear(x, weight, Fusion(gated=gated))) < 1e-5


@pytest.mark.skipif(not ON_CUDA, reason="Triton's interpreter rounds to e4m3 wrongly")
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 33, 64, 65, 300])
def test_layer_ops(rows: int) -> None:
    """Sizes whose blocks are no multiple of 4, with all that the GEMMs are given."""
    x = random(rows, 6 * BLOCK).bfloat16()
    ops = FusedOps()
    assert torch.equal(
        fp8_gemm.quantize_rows(x).values[:rows].view(torch.uint8),
        reference_rows(x).values.view(torch.uint8),
    )
    rounded = x if rows == 1 else dequantize_rows(reference_rows(x))
    for gated in (False, True):
        weight = quantize(random((1 + gated) * 3 * BLOCK, 6 * BLOCK))
        padded = Fp8Weight.empty(len(weight.values), 6 * BLOCK, DEVICE)
        padded.copy_(weight)
        expected = fused_linear(rounded.float(), weight, Fusion(gated=gated))
        assert error(ops.linear(x, padded, None, gated).float(), expected) < 6e-3
    bias = random(3 * BLOCK).bfloat16()
    part = split(padded, [3 * BLOCK, 3 * BLOCK])[1]
    expected = fused_linear(rounded.float(), part, Fusion()) + bias
    assert error(ops.linear(x, part, bias).float(), expected) < 6e-3
