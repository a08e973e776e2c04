"""Matrix products of a few rows against the plain one; on a CPU, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nanovllm.kernels.layers import gemv
from nanovllm.kernels.layers.linear import Around, Norm, linear

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
# Relative, ||out - expected|| / ||expected||.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def check(tuning: gemv.Tuning, rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """With everything that may be around it."""
    x = random(rows, inputs, dtype=dtype) * 3
    norm = Norm(random(inputs, dtype=dtype), 1e-6)
    residual = random(rows, outputs, dtype=dtype)
    for around in (
        Around(),
        Around(norm=norm),
        Around(residual=residual),
        Around(gated=True),
        Around(norm, gated=True, residual=residual),
    ):
        weight = random((1 + around.gated) * outputs, inputs, dtype=dtype) * inputs**-0.5
        out = gemv.linear(x, weight, around, tuning)
        expected = linear(x, weight, around)
        assert out.dtype == dtype
        error = (out.float() - expected.float()).norm() / expected.float().norm()
        assert error.item() < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_gemv(dtype: torch.dtype) -> None:
    small = (gemv.Tuning(2, 2), gemv.Tuning(4, 1), gemv.Tuning(2, 4))
    cases = [(tuning, shape) for tuning in small for shape in ((1, 64, 19), (3, 300, 9))]
    if ON_CUDA:
        cases += [
            (gemv.Tuning(2, 2), (1, 1024, 4096)),
            (gemv.Tuning(4, 2), (2, 1024, 4096)),
            (gemv.Tuning(2, 4), (4, 2048, 1024)),
            (gemv.Tuning(4, 4), (1, 4096, 12288)),
            (gemv.Tuning(4, 8), (1, 12288, 4096)),
        ]
    for tuning, shape in cases:
        check(tuning, *shape, dtype)
