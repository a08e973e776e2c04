"""The fused ops against the plain ones; on a CPU, Triton's in its interpreter."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanovllm.kernels.attention.choose import ByPhaseBackend
from nanovllm.kernels.attention.interface import LayerCache
from nanovllm.kernels.attention.triton_decode import TritonDecodeBackend
from nanovllm.kernels.layers.fused import FusedOps
from nanovllm.kernels.layers.ops import Embedding, Heads, LayerOps, Norm
from nanovllm.services.gpu_worker.model import decoder
from tests.checkpoints import write_checkpoint
from tests.gpu_worker.paged import PagedSequences, load_model, relative_error

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
EPS = 1e-6
# As a fraction of each element: float32 sums in any order; a rounding that falls the other way.
# The interpreter does not round to bfloat16, but cuts off.
TOLERANCES = {
    torch.float32: 1e-5,
    torch.bfloat16: 2**-7 if ON_CUDA else 2**-5,
    torch.float16: 2**-10,
}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES)


class Random:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.generator = torch.Generator(DEVICE).manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=DEVICE).to(self.dtype)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    # Absolute, since the two products of a rotation may nearly cancel; they are float32.
    torch.testing.assert_close(found, expected, rtol=TOLERANCES[expected.dtype], atol=1e-5)


@DTYPES
@pytest.mark.parametrize("first", [0, 40])
def test_embed(dtype: torch.dtype, first: int) -> None:
    """Tokens of this rank, and those of others."""
    random = Random(dtype)
    tokens = torch.tensor([39, 40, 41, 76, 77, 0, 40], device=DEVICE)
    if not first:
        tokens %= 37
    positions = torch.tensor([0, 9, 4, 5, 9, 1, 2], device=DEVICE)
    for hidden, dim in ((48, 16), (1000, 96), (1024, 128)):
        weight = random(37, hidden)
        weight[0] = torch.nan
        embedding = Embedding(weight, first, random(10, dim).float())
        for n in (1, 7):
            found = FusedOps().embed(tokens[:n], positions[:n], embedding)
            for one, other in zip(
                found, LayerOps().embed(tokens[:n], positions[:n], embedding), strict=True
            ):
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
            here = ((tokens[:n] >= first) & (tokens[:n] < first + 37)).tolist()
            assert found[0].ne(0).any(dim=1).tolist() == here


@DTYPES
def test_add_rms_norm(dtype: torch.dtype) -> None:
    sizes = [(1, 1), (3, 48), (2, 1000), (1, 1024)]
    if ON_CUDA:
        sizes += [(513, 1024), (7, 2560), (16384, 4096), (33, 12288)]
    random = Random(dtype)
    for rows, size in sizes:
        x, residual, norm = random(rows, size), random(rows, size), Norm(random(size), EPS)
        for before in (None, residual):
            normed, total = FusedOps().add_rms_norm(x, before, norm)
            expected_normed, expected_total = LayerOps().add_rms_norm(x, before, norm)
            assert_same(total, expected_total)
            assert_same(normed, expected_normed)


@DTYPES
def test_logits(dtype: torch.dtype) -> None:
    """One row goes to a kernel of ours; all may be written where the caller says."""
    sizes = [(1, 48, 37), (3, 48, 37), (1, 1040, 5)]
    if ON_CUDA:
        sizes += [(1, 1024, 151_936), (2, 1024, 151_936)]
    random = Random(dtype)
    for rows, inputs, vocab in sizes:
        hidden, weight = random(rows, inputs), random(vocab, inputs)
        expected = LayerOps().logits(hidden, weight, None)
        out = torch.empty_like(expected)
        found = FusedOps().logits(hidden, weight, out)
        assert found.data_ptr() == out.data_ptr()
        for logits in (out, FusedOps().logits(hidden, weight, None)):
            error = (logits.float() - expected.float()).norm() / expected.float().norm()
            assert error.item() < TOLERANCES[dtype]


@DTYPES
def test_norm_rope_store(dtype: torch.dtype) -> None:
    shapes = [(1, 2, 2, 16), (5, 3, 1, 32), (3, 16, 8, 128), (2, 4, 2, 24)]
    if ON_CUDA:
        shapes += [(1, 16, 8, 128), (512, 16, 8, 128), (16384, 16, 8, 128), (100, 5, 1, 256)]
    random = Random(dtype)
    for (tokens, num, num_kv, dim), normed in itertools.product(shapes, (True, False)):
        qkv = random(tokens, (num + 2 * num_kv) * dim)
        q_norm, k_norm = (Norm(random(dim), EPS) if normed else None for _ in range(2))
        angles = torch.rand(tokens, dim // 2, generator=random.generator, device=DEVICE) * 1000
        rotation = torch.cat((angles.cos(), angles.sin()), dim=-1)
        blocks, block_size = tokens // 16 + 2, 16
        indices = torch.randperm(blocks * block_size, generator=random.generator, device=DEVICE)
        before = random(2, blocks, block_size, num_kv, dim)
        caches = [LayerCache(*before.clone()) for _ in range(2)]
        q, expected_q = (
            ops.norm_rope_store(Heads(qkv, q_norm, k_norm, rotation, cache, indices[:tokens]))
            for ops, cache in zip((FusedOps(), LayerOps()), caches, strict=True)
        )
        assert_same(q, expected_q)
        assert_same(caches[0].k, caches[1].k)
        assert torch.equal(caches[0].v, caches[1].v)


@DTYPES
def test_silu_mul(dtype: torch.dtype) -> None:
    random = Random(dtype)
    sizes = [(1, 1), (3, 48), (2, 3072)]
    if ON_CUDA:
        sizes += [(512, 3072), (16384, 3072), (5, 25600)]
    for rows, size in sizes:
        gate_up = random(rows, 2 * size) * 10
        assert_same(FusedOps().silu_mul(gate_up), LayerOps().silu_mul(gate_up))


@pytest.mark.skipif(ON_CUDA, reason="a model on a CPU, whose kernels the interpreter runs")
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_model_of_fused_ops_has_the_same_logits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_checkpoint(tmp_path, family=family, head_dim=32)
    sequences = [[5, 7, 500, 2, 88, 90, 3, 4, 8, 1], [44]]
    expected = PagedSequences(load_model(directory), sequences, 32).run(4)
    monkeypatch.setattr(decoder, "choose_ops", lambda device: FusedOps())
    # Steps of 10 rows and of one, whose attention is a fused kernel, too.
    fused = PagedSequences(load_model(directory), sequences, 32)
    fused.backend = ByPhaseBackend(TritonDecodeBackend(fused.backend.shape), fused.backend)
    for logits, wanted in zip(fused.run(4), expected, strict=True):
        assert relative_error(logits, wanted) < 1e-5
