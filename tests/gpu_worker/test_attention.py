"""The reference attention backend against the formula, over random ragged paged batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovllm.kernels.attention import sdpa
from nanovllm.kernels.attention.interface import NOWHERE, AttentionShape, LayerCache
from nanovllm.kernels.attention.sdpa import SdpaBackend, group_by_length
from tests.gpu_worker.paged import batch_metadata


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [q_len, heads, d] at the end of k and v [ctx_len, kv_heads, d], in float64."""
    per_kv_head = q.shape[1] // k.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(per_kv_head, dim=0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    before = k.shape[1] - q.shape[1]
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(before)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    out: Tensor = (weights @ v).transpose(0, 1).float()
    return out


class Paged:
    """Random contexts in a random paged cache; what lies outside them is huge."""

    def __init__(self, shape: AttentionShape, lengths: list[int], contexts: list[int]) -> None:
        generator = torch.Generator().manual_seed(len(contexts))
        self.shape = shape
        most = -(-max(contexts) // shape.block_size)
        blocks = most * len(contexts)
        order = torch.randperm(blocks, generator=generator)
        tables = order.to(torch.int32).view(len(contexts), most)
        size = (blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
        self.cache = LayerCache(torch.full(size, 1e4), torch.full(size, 1e4))
        self.metadata = batch_metadata(tables, shape.block_size, lengths, contexts)
        self.lengths = lengths

        def random(tokens: int, heads: int) -> Tensor:
            return torch.randn(tokens, heads, shape.head_dim, generator=generator)

        self.q = random(sum(lengths), shape.num_heads)
        self.keys = [random(context, shape.num_kv_heads) for context in contexts]
        self.values = [random(context, shape.num_kv_heads) for context in contexts]
        for i, (length, context) in enumerate(zip(lengths, contexts, strict=True)):
            for held, given_ in ((self.cache.k, self.keys), (self.cache.v, self.values)):
                for position in range(context - length):
                    block, offset = divmod(position, shape.block_size)
                    held[tables[i, block], offset] = given_[i][position]

    def new(self, whole: list[Tensor]) -> Tensor:
        """The query tokens' rows."""
        return torch.cat(
            [rows[len(rows) - length :] for rows, length in zip(whole, self.lengths, strict=True)]
        )

    def run(self) -> Tensor:
        batch = SdpaBackend(self.shape).prepare(self.metadata)
        batch.store(self.new(self.keys), self.new(self.values), self.cache)
        return batch.forward(self.q, self.cache)

    def expected(self) -> Tensor:
        queries = torch.split(self.q, self.lengths)
        return torch.cat(
            [
                plain_attention(q, k, v)
                for q, k, v in zip(queries, self.keys, self.values, strict=True)
            ]
        )


SEQUENCES = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 60)), min_size=1, max_size=6).map(
    lambda pairs: [(length, length + before) for length, before in pairs]
)


@settings(max_examples=60, deadline=None)
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
    paged = Paged(shape, lengths, contexts)
    torch.testing.assert_close(paged.run(), paged.expected(), rtol=1e-4, atol=1e-5)


def test_groups_and_tiles_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = AttentionShape(4, 2, 8, 16)
    lengths, contexts = [1, 1, 1, 1, 1, 40, 33], [50, 3, 100, 49, 64, 77, 33]
    expected = Paged(shape, lengths, contexts).run()
    monkeypatch.setattr(sdpa, "QUERY_TILE", 7)
    monkeypatch.setattr(sdpa, "GATHER_ELEMENTS", 64 * 2 * 8 * 2)
    torch.testing.assert_close(Paged(shape, lengths, contexts).run(), expected)


def test_a_sequence_is_the_same_alone_and_in_a_batch() -> None:
    shape = AttentionShape(4, 2, 8, 16)
    together = Paged(shape, [1, 1, 1, 20], [50, 30, 33, 45])
    out = torch.split(together.run(), together.lengths)
    for i, tables in enumerate(together.metadata.block_tables):
        length, context = together.lengths[i], len(together.keys[i])
        metadata = batch_metadata(tables[None], shape.block_size, [length], [context])
        batch = SdpaBackend(shape).prepare(metadata)
        alone = batch.forward(torch.split(together.q, together.lengths)[i], together.cache)
        torch.testing.assert_close(alone, out[i], rtol=1e-6, atol=1e-6)


def test_what_goes_nowhere_is_not_stored() -> None:
    shape = AttentionShape(2, 2, 8, 4)
    paged = Paged(shape, [3], [6])
    paged.metadata.slot_mapping[1] = NOWHERE
    before = paged.cache.k.clone()
    batch = SdpaBackend(shape).prepare(paged.metadata)
    batch.store(paged.new(paged.keys), paged.new(paged.values), paged.cache)
    changed = (paged.cache.k != before).view(-1, 2 * 8).any(dim=1).nonzero().squeeze(1)
    slots = paged.metadata.slot_mapping
    assert changed.tolist() == sorted(slots[slots != NOWHERE].tolist())
    flat = paged.cache.v.view(-1, 2, 8)
    assert torch.equal(flat[slots[2]], paged.values[0][5])


@given(lengths=st.lists(st.integers(1, 5000), max_size=100))
def test_groups_are_bounded_and_hold_each_sequence_once(lengths: list[int]) -> None:
    shape = AttentionShape(8, 8, 128, 16)
    groups = list(group_by_length(np.array(lengths, dtype=np.int32), shape))
    assert sorted(np.concatenate([[], *groups]).tolist()) == list(range(len(lengths)))
    for group in groups:
        members = [lengths[i] for i in group]
        assert 2 * min(members) >= max(members)
        assert len(group) == 1 or len(group) * max(members) * 8 * 128 <= sdpa.GATHER_ELEMENTS
