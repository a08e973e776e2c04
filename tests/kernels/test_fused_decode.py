"""Decode attention with what comes before and after it, against the plain ops; on a CPU, Triton's
kernels in its interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nanovllm.kernels.attention.interface import AttentionBatch, AttentionShape, LayerCache, Parts
from nanovllm.kernels.attention.sdpa import SdpaBackend
from nanovllm.kernels.attention.triton_decode import TritonDecodeBackend
from nanovllm.kernels.layers.fused import FusedOps
from nanovllm.kernels.layers.ops import Heads, LayerOps, Norm
from tests.gpu_worker.paged import kv_indices
from tests.kernels.ragged import CPU, Ragged

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda") if ON_CUDA else CPU
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
HIDDEN = 40


class Step:
    """A decode step's attention of one layer: a random query, key and value that end `context`."""

    def __init__(
        self, shape: AttentionShape, context: int, dtype: torch.dtype, normed: bool
    ) -> None:
        self.ragged = Ragged(shape, [1], [context], dtype, DEVICE)
        generator = torch.Generator(DEVICE).manual_seed(context)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=DEVICE).to(dtype)

        dim = shape.head_dim
        self.qkv = random(1, (shape.num_heads + 2 * shape.num_kv_heads) * dim)
        self.q_norm, self.k_norm = (Norm(random(dim), 1e-6) if normed else None for _ in "qk")
        angles = torch.rand(1, dim // 2, generator=generator, device=DEVICE) * 1000
        self.rotation = torch.cat((angles.cos(), angles.sin()), dim=-1)
        tables = self.ragged.metadata.block_tables
        self.kv_indices = kv_indices(tables, shape.block_size, [1], [context]).to(DEVICE)
        self.weight = random(HIDDEN, shape.num_heads * dim)
        self.residual = random(1, HIDDEN)

    def run(self, ops: LayerOps, batch: AttentionBatch) -> tuple[Tensor | Parts, LayerCache]:
        cache = LayerCache(self.ragged.cache.k.clone(), self.ragged.cache.v.clone())
        norms = self.q_norm, self.k_norm
        heads = Heads(self.qkv, *norms, self.rotation, cache, self.kv_indices)
        return ops.attend(heads, batch, joins=True), cache

    def check(self) -> None:
        shape, metadata = self.ragged.shape, self.ragged.metadata
        tolerance = TOLERANCES[self.qkv.dtype]
        expected, stored = self.run(LayerOps(), SdpaBackend(shape).prepare(metadata))
        assert isinstance(expected, Tensor)
        # In a captured step lengths on the host are upper bounds.
        metadata.context_lens[:] = 4096
        parts, cache = self.run(FusedOps(), TritonDecodeBackend(shape).prepare(metadata))
        assert isinstance(parts, Parts)
        # The interpreter does not round to bfloat16, but cuts off.
        torch.testing.assert_close(cache.k, stored.k, rtol=4 * tolerance, atol=1e-5)
        assert torch.equal(cache.v, stored.v)
        assert relative(parts.join(), expected) < tolerance
        for ops in (LayerOps(), FusedOps()):
            projected = ops.linear(parts, self.weight, None)
            assert relative(projected, LayerOps().linear(expected, self.weight, None)) < tolerance
            added, before = ops.linear_add(parts, self.weight, None, self.residual)
            added = added if before is None else added + before
            assert relative(added, projected + self.residual) < tolerance


def relative(found: Tensor, expected: Tensor) -> float:
    difference = (found.float() - expected.float()).norm()
    return float(difference / expected.float().norm())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size", "context"),
    [
        (4, 2, 64, 64, 1),
        (4, 2, 64, 64, 64),
        (4, 2, 64, 64, 65),
        (3, 1, 64, 48, 17),
        (4, 2, 128, 16, 300),
        (2, 2, 32, 256, 130),
    ],
)
def test_one_decode(
    heads: int, kv_heads: int, head_dim: int, block_size: int, context: int
) -> None:
    shape = AttentionShape(heads, kv_heads, head_dim, block_size)
    Step(shape, context, torch.float32, normed=True).check()


@pytest.mark.skipif(not ON_CUDA, reason="the interpreter is too slow")
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_large(dtype: torch.dtype) -> None:
    for heads, kv_heads in ((16, 8), (4, 2), (32, 8), (8, 2), (8, 1)):
        for context in (1, 63, 64, 65, 66, 640, 2000, 8000):
            shape = AttentionShape(heads, kv_heads, 128, 256)
            Step(shape, context, dtype, normed=True).check()


def test_values_outside_a_context_do_no_harm() -> None:
    shape = AttentionShape(4, 2, 64, 64)
    step = Step(shape, 70, torch.float32, normed=True)
    step.ragged = Ragged(shape, [1], [70], device=DEVICE, outside=torch.nan)
    parts, _ = step.run(FusedOps(), TritonDecodeBackend(shape).prepare(step.ragged.metadata))
    assert FusedOps().linear(parts, step.weight, None).isfinite().all()


def test_nan_is_not_hidden() -> None:
    shape = AttentionShape(4, 2, 64, 64)
    for column in (0, 4 * 64):  # a query's, a key's
        step = Step(shape, 70, torch.float32, normed=False)
        step.qkv[0, column] = torch.nan
        parts, _ = step.run(FusedOps(), TritonDecodeBackend(shape).prepare(step.ragged.metadata))
        assert FusedOps().linear(parts, step.weight, None).isnan().all()
