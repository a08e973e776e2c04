"""Random ragged batches over a paged cache, and what attention makes of them by the formula."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels.attention.interface import (
    AttentionBackend,
    AttentionShape,
    LayerCache,
    store_kv,
)
from tests.gpu_worker.paged import batch_metadata

CPU = torch.device("cpu")


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [q_len, heads, d] at the end of k and v [ctx_len, kv_heads, d], in float64."""
    per_kv_head = q.shape[1] // k.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(per_kv_head, dim=0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    before = k.shape[1] - q.shape[1]
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(before)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    out: Tensor = (weights @ v).transpose(0, 1).float()
    return out


class Ragged:
    """Random contexts in a random paged cache.

    Args:
        lengths: query tokens of each sequence, those with one first.
        contexts: of each, its query tokens included.
        outside: what lies outside them.
    """

    def __init__(
        self,
        shape: AttentionShape,
        lengths: list[int],
        contexts: list[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
        outside: float = 1e4,
    ) -> None:
        generator = torch.Generator(device).manual_seed(len(contexts))
        self.shape = shape
        most = -(-max(contexts) // shape.block_size)
        blocks = most * len(contexts)
        order = torch.randperm(blocks, generator=generator, device=device)
        tables = order.to(torch.int32).view(len(contexts), most)
        size = (blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
        unused = torch.full(size, outside, dtype=dtype, device=device)
        self.cache = LayerCache(unused, unused.clone())
        self.metadata = batch_metadata(tables, lengths, contexts, device)
        self.lengths = lengths

        def random(tokens: int, heads: int) -> Tensor:
            x = torch.randn(tokens, heads, shape.head_dim, generator=generator, device=device)
            return x.to(dtype)

        self.q = random(sum(lengths), shape.num_heads)
        self.keys = [random(context, shape.num_kv_heads) for context in contexts]
        self.values = [random(context, shape.num_kv_heads) for context in contexts]
        for table, k, v in zip(tables, self.keys, self.values, strict=True):
            positions = torch.arange(len(k), device=device)
            starts = table[positions // shape.block_size].long() * shape.block_size
            store_kv(k, v, self.cache, starts + positions % shape.block_size)

    def run(self, backend: AttentionBackend) -> Tensor:
        return backend.prepare(self.metadata).forward(self.q, self.cache)

    def expected(self) -> Tensor:
        """Float32."""
        queries = torch.split(self.q, self.lengths)
        return torch.cat(
            [
                plain_attention(q, k, v)
                for q, k, v in zip(queries, self.keys, self.values, strict=True)
            ]
        )
