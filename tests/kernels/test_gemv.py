"""GEMVs against the reference; on a CPU, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nanovllm.kernels.layers import fp8_normed, gemv
from nanovllm.kernels.layers.fp8 import quantize
from nanovllm.kernels.layers.fp8_normed import NormedTuning
from nanovllm.kernels.layers.gemv import GemvTuning
from nanovllm.kernels.layers.ops import Fusion, Norm, fused_linear

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
# Relative, ||out - expected|| / ||expected||.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def check(tuning: GemvTuning, rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """With all that may be fused."""
    x = random(rows, inputs, dtype=dtype) * 3
    norm = Norm(random(inputs, dtype=dtype), 1e-6)
    residual = random(rows, outputs, dtype=dtype)
    for fusion in (
        Fusion(),
        Fusion(norm=norm),
        Fusion(residual=residual),
        Fusion(gated=True),
        Fusion(norm, gated=True, residual=residual),
    ):
        weight = random((1 + fusion.gated) * outputs, inputs, dtype=dtype) * inputs**-0.5
        out = gemv.linear(x, weight, fusion, tuning)
        expected = fused_linear(x, weight, fusion)
        assert out.dtype == dtype
        error = (out.float() - expected.float()).norm() / expected.float().norm()
        assert error.item() < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_gemv(dtype: torch.dtype) -> None:
    small = (GemvTuning(2, 2), GemvTuning(4, 1), GemvTuning(2, 4))
    cases = [(tuning, shape) for tuning in small for shape in ((1, 64, 19), (3, 300, 9))]
    if ON_CUDA:
        cases += [
            (GemvTuning(2, 2), (1, 1024, 4096)),
            (GemvTuning(4, 2), (2, 1024, 4096)),
            (GemvTuning(2, 4), (4, 2048, 1024)),
            (GemvTuning(4, 4), (1, 4096, 12288)),
            (GemvTuning(4, 8), (1, 12288, 4096)),
        ]
    for tuning, shape in cases:
        check(tuning, *shape, dtype)


@pytest.mark.parametrize("gated", [False, True])
def test_fp8_behind_a_norm(gated: bool) -> None:
    """One part of a row and several, tiles of one output and of several."""
    dtype = torch.bfloat16 if ON_CUDA else torch.float32
    cases = [(NormedTuning(1, 1, 5), 1024, 256), (NormedTuning(4, 2, 3), 1024, 128)]
    if ON_CUDA:
        cases += [(NormedTuning(1, 2, 16), 4096, 12288), (NormedTuning(1, 4, 8), 4096, 6144)]
    for tuning, inputs, outputs in cases:
        x, norm = random(1, inputs, dtype=dtype) * 3, Norm(random(inputs, dtype=dtype), 1e-6)
        weight = quantize(random((1 + gated) * outputs, inputs, dtype=dtype) * inputs**-0.5)
        found = fp8_normed.normed_linear(x, norm, weight, gated, tuning)
        expected = fused_linear(x, weight, Fusion(norm, gated))
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        assert error.item() < TOLERANCES[dtype]
