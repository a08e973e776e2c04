"""The attention backends of a GPU against the formula; on a CPU, Triton's in its interpreter."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.kernels.attention.choose import ByPhaseBackend, choose
from nanovllm.kernels.attention.interface import AttentionBackend, AttentionShape
from nanovllm.kernels.attention.triton_decode import TritonDecodeBackend
from nanovllm.kernels.attention.triton_prefill import TritonPrefillBackend
from nanovllm.kernels.attention.tuning import (
    MIN_SPLIT_KEYS,
    Gpu,
    PrefillTuning,
    choose_prefill_splits,
    max_prefill_tiles,
)
from tests.gpu_worker.paged import batch_metadata
from tests.kernels.ragged import CPU, Ragged

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda") if ON_CUDA else CPU
# Relative, ||out - expected|| / ||expected||.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def triton_backend(shape: AttentionShape) -> AttentionBackend:
    return ByPhaseBackend(TritonDecodeBackend(shape), TritonPrefillBackend(shape))


def check(
    make: Callable[[AttentionShape], AttentionBackend],
    shape: AttentionShape,
    lengths: list[int],
    contexts: list[int],
    dtype: torch.dtype = torch.float32,
) -> None:
    ragged = Ragged(shape, lengths, contexts, dtype, DEVICE)
    out, expected = ragged.run(make(shape)), ragged.expected()
    assert out.dtype == dtype
    error = torch.linalg.vector_norm(out.float() - expected) / torch.linalg.vector_norm(expected)
    assert error.item() < TOLERANCES[dtype]


@pytest.mark.parametrize(
    ("kv_heads", "per_kv_head", "head_dim", "block_size", "lengths", "contexts"),
    [
        (2, 2, 16, 16, [1, 1, 1, 5, 33], [1, 16, 130, 5, 40]),
        (1, 8, 64, 32, [1, 1, 70], [65, 64, 81]),
        (2, 3, 32, 48, [1, 1, 1], [48, 49, 96]),
        (1, 1, 128, 256, [1, 1, 17], [100, 257, 300]),
    ],
)
def test_small_batches(
    kv_heads: int,
    per_kv_head: int,
    head_dim: int,
    block_size: int,
    lengths: list[int],
    contexts: list[int],
) -> None:
    shape = AttentionShape(kv_heads * per_kv_head, kv_heads, head_dim, block_size)
    check(triton_backend, shape, lengths, contexts)


def test_many_splits_of_short_and_long_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = AttentionShape(4, 2, 16, 16)

    def split(shape: AttentionShape) -> AttentionBackend:
        backend = TritonDecodeBackend(shape)
        monkeypatch.setattr(backend, "_processors", 14)
        return backend

    check(split, shape, [1, 1, 1, 1], [1, 64, 65, 600])


def test_why_a_backend_cannot_run() -> None:
    shape = AttentionShape(4, 2, 64, 48)
    for name in ("triton", "flash-attn"):
        with pytest.raises(ValueError, match=f"--attention {name} cannot run: it needs a GPU"):
            choose(name, shape, torch.bfloat16, CPU)
    cuda = torch.device("cuda")
    with pytest.raises(ValueError, match="no power of two"):
        choose("triton", shape._replace(head_dim=24), torch.bfloat16, cuda)
    with pytest.raises(ValueError, match="no multiple of 16"):
        choose("triton", shape._replace(block_size=8), torch.bfloat16, cuda)
    with pytest.raises(ValueError, match=r"not installed|48 is no multiple of 256"):
        choose("flash-attn", shape, torch.bfloat16, cuda)


def test_stale_values_in_a_block_do_no_harm() -> None:
    for block_size in (16, 64):
        shape = AttentionShape(4, 2, 16, block_size)
        ragged = Ragged(shape, [1, 20], [30, 70], device=DEVICE, outside=torch.nan)
        assert not ragged.run(triton_backend(shape)).isnan().any()


def test_lengths_on_the_host_may_be_more_than_the_true_ones() -> None:
    shape = AttentionShape(4, 2, 16, 16)
    ragged = Ragged(shape, [1, 1], [30, 200], device=DEVICE)
    expected = ragged.run(triton_backend(shape))
    ragged.metadata.context_lens[:] = 4096
    torch.testing.assert_close(ragged.run(triton_backend(shape)), expected)


@pytest.mark.parametrize(
    ("per_kv_head", "head_dim", "block_size", "tuning", "processors"),
    [
        (1, 16, 64, PrefillTuning(32, 32), 1),
        (2, 64, 128, PrefillTuning(64, 64), 40),
        (2, 32, 64, PrefillTuning(32, 64, descriptors=False), 40),
        (3, 16, 48, PrefillTuning(32, 32), 1),
        (8, 16, 64, PrefillTuning(64, 64), 500),
        (5, 16, 16, PrefillTuning(64, 64), 20),
    ],
)
def test_prefills_however_they_are_cut(
    per_kv_head: int,
    head_dim: int,
    block_size: int,
    tuning: PrefillTuning,
    processors: int,
) -> None:
    shape = AttentionShape(2 * per_kv_head, 2, head_dim, block_size)
    dtype, device = torch.float32, Gpu(processors)
    if ON_CUDA:
        # Tensor cores take no fewer rows.
        tuning, dtype = tuning._replace(rows=max(tuning.rows, 64)), torch.bfloat16
        device = device._replace(descriptors=Gpu.current().descriptors)
    backend = TritonPrefillBackend(shape, tuning, device)
    # As in a captured step, some have no tokens.
    # The last tokens of the long one see a part of its keys that others of their tile do not.
    lengths, contexts = [33, 0, 1, 20, 0], [40, 0, 1, 1030, 0]
    check(lambda _: backend, shape, lengths, contexts, dtype)
    ragged = Ragged(shape, lengths, contexts, dtype, DEVICE)
    expected = ragged.run(backend)
    ragged.metadata.query_lens[:] = sum(lengths)
    ragged.metadata.context_lens[:] = 4096
    found = ragged.run(backend)
    assert (found - expected).norm() <= TOLERANCES[dtype] * expected.norm()


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=40),
    st.integers(1, 128),
    st.integers(1, 500),
    st.integers(1, 100_000),
)
def test_tiles_are_enough_and_splits_are_of_use(
    lengths: list[int], tokens: int, slots: int, context: int
) -> None:
    metadata = batch_metadata(torch.zeros(len(lengths), 1).int(), lengths, lengths)
    needed = sum(-(-length // tokens) for length in lengths)
    assert max_prefill_tiles(metadata, sum(lengths), tokens) == max(1, needed)
    metadata.query_lens[:] = sum(lengths)  # bounds
    bound = max_prefill_tiles(metadata, sum(lengths), tokens)
    assert needed <= bound <= max(1, sum(lengths) // tokens + len(lengths))
    splits = choose_prefill_splits(bound, slots, context)
    assert splits == 1 or context >= MIN_SPLIT_KEYS * splits
    assert splits == 1 or bound * splits <= 2 * slots
    # How much of a context any processor computes, one part after the other.
    assert splits == 1 or -(-bound * splits // slots) / splits < -(-bound // slots)


def test_contexts_are_split_where_tiles_are_few() -> None:
    # Qwen3-0.6B's chunks of 128, 512, 600 and 2048 tokens on 132 processors.
    assert [choose_prefill_splits(programs, 264, 8000) for programs in (32, 128, 150, 512)] == [
        8,
        2,
        3,
        1,
    ]
    assert choose_prefill_splits(32, 264, 1000) == 1


# Block size, query heads a KV head.
CACHES = [(16, 1), (32, 5), (48, 2), (64, 8), (256, 1), (256, 2), (256, 5), (256, 8)]


@pytest.mark.skipif(not ON_CUDA, reason="the interpreter is too slow")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("triton", torch.float32),
        ("triton", torch.bfloat16),
        ("triton", torch.float16),
        ("auto", torch.bfloat16),
        ("flash-attn", torch.bfloat16),  # builds of it for one dtype only exist
    ],
)
def test_large_random_batches(name: str, dtype: torch.dtype, head_dim: int) -> None:
    for block_size, per_kv_head in CACHES:
        if name == "flash-attn":
            if importlib.util.find_spec("flash_attn") is None:
                pytest.skip("flash-attn is not installed")
            if block_size % 256:
                continue
        shape = AttentionShape(2 * per_kv_head, 2, head_dim, block_size)
        rng = random.Random(f"{name}{per_kv_head}{block_size}{head_dim}{dtype}")
        decodes = [
            rng.choice([1, 17, 256, rng.randint(1, 4096)]) for _ in range(rng.randint(1, 40))
        ]
        prefills = [
            (rng.randint(2, 1500), rng.choice([0, 256, rng.randint(0, 2500)])) for _ in "abc"
        ]
        check(
            lambda shape: choose(name, shape, dtype, DEVICE).backend,
            shape,
            [1] * len(decodes) + [length for length, _ in prefills],
            decodes + [length + before for length, before in prefills],
            dtype,
        )
