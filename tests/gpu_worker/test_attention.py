"""The reference attention backend against the formula, over random ragged paged batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.kernels.attention import sdpa
from nanovllm.kernels.attention.interface import AttentionShape
from nanovllm.kernels.attention.sdpa import SdpaBackend, group_by_length
from tests.gpu_worker.paged import batch_metadata
from tests.kernels.ragged import Ragged

SEQUENCES = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 60)), min_size=1, max_size=6).map(
    lambda pairs: [(length, length + before) for length, before in pairs]
)


@settings(max_examples=60)
@given(
    decodes=st.lists(st.integers(1, 90), max_size=8),
    others=SEQUENCES,
    kv_heads=st.sampled_from([1, 2]),
    per_kv_head=st.sampled_from([1, 3, 8]),
    block_size=st.sampled_from([1, 5, 16, 64]),
)
def test_it_equals_the_formula(
    decodes: list[int],
    others: list[tuple[int, int]],
    kv_heads: int,
    per_kv_head: int,
    block_size: int,
) -> None:
    shape = AttentionShape(kv_heads * per_kv_head, kv_heads, 8, block_size)
    lengths = [1] * len(decodes) + [length for length, _ in others]
    contexts = decodes + [context for _, context in others]
    ragged = Ragged(shape, lengths, contexts)
    out = ragged.run(SdpaBackend(shape))
    torch.testing.assert_close(out, ragged.expected(), rtol=1e-4, atol=1e-5)


def test_nan_outside_a_context_stays_there() -> None:
    shape = AttentionShape(4, 2, 8, 16)
    ragged = Ragged(shape, [1, 1, 1, 20], [50, 30, 33, 45], outside=torch.nan)
    torch.testing.assert_close(ragged.run(SdpaBackend(shape)), ragged.expected())


def test_groups_and_tiles_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = AttentionShape(4, 2, 8, 16)
    lengths, contexts = [1, 1, 1, 1, 1, 40, 33], [50, 3, 100, 49, 64, 77, 33]
    expected = Ragged(shape, lengths, contexts).run(SdpaBackend(shape))
    monkeypatch.setattr(sdpa, "QUERY_TILE", 7)
    monkeypatch.setattr(sdpa, "GATHER_ELEMENTS", 64 * 2 * 8 * 2)
    out = Ragged(shape, lengths, contexts).run(SdpaBackend(shape))
    torch.testing.assert_close(out, expected)


def test_a_sequence_is_the_same_alone_and_in_a_batch() -> None:
    shape = AttentionShape(4, 2, 8, 16)
    together = Ragged(shape, [1, 1, 1, 20], [50, 30, 33, 45])
    out = torch.split(together.run(SdpaBackend(shape)), together.lengths)
    for i, tables in enumerate(together.metadata.block_tables):
        length, context = together.lengths[i], len(together.keys[i])
        metadata = batch_metadata(tables[None], [length], [context])
        batch = SdpaBackend(shape).prepare(metadata)
        alone = batch.forward(torch.split(together.q, together.lengths)[i], together.cache)
        torch.testing.assert_close(alone, out[i], rtol=1e-6, atol=1e-6)


@given(lengths=st.lists(st.integers(1, 5000), max_size=100))
def test_groups_are_bounded_and_hold_each_sequence_once(lengths: list[int]) -> None:
    shape = AttentionShape(8, 8, 128, 16)
    groups = list(group_by_length(np.array(lengths, dtype=np.int32), shape))
    assert sorted(np.concatenate([[], *groups]).tolist()) == list(range(len(lengths)))
    for group in groups:
        members = [lengths[i] for i in group]
        assert 2 * min(members) >= max(members)
        assert len(group) == 1 or len(group) * max(members) * 8 * 128 <= sdpa.GATHER_ELEMENTS
