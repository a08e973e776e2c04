"""Drives a model over a paged cache in any ragged schedule, as a runner would; and what stands for
a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from nanovllm.checkpoint import ModelConfig
from nanovllm.kernels.attention.interface import AttentionBackend, AttentionMetadata
from nanovllm.kernels.attention.sdpa import SdpaBackend
from nanovllm.services.gpu_worker.model.loader import as_stored, load_checkpoint
from nanovllm.services.gpu_worker.model.parallel import TensorParallel
from nanovllm.services.gpu_worker.model.registry import Model, build_model
from nanovllm.services.gpu_worker.startup import allocate_kv_cache, attention_shape

T = TypeVar("T")
CPU = torch.device("cpu")


def load_model(
    directory: Path,
    tp: TensorParallel | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> Model:
    config = as_stored(ModelConfig.from_checkpoint(directory), directory)
    length = config.max_position_embeddings
    model = build_model(config, length, tp or TensorParallel(), dtype, device)
    load_checkpoint(model, directory, lambda done, total: None)
    return model


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def batch_metadata(
    block_tables: Tensor, lengths: list[int], contexts: list[int], device: torch.device = CPU
) -> AttentionMetadata:
    """Of sequences with `lengths` query tokens at the end of `contexts`; those with one first."""
    decodes = 0
    while decodes < len(lengths) and lengths[decodes] == 1:
        decodes += 1
    return AttentionMetadata(
        num_decodes=decodes,
        query_lens=np.array(lengths, dtype=np.int32),
        context_lens=np.array(contexts, dtype=np.int32),
        cu_seqlens_q=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device),
        cache_seqlens=torch.tensor(contexts, dtype=torch.int32, device=device),
        block_tables=block_tables.to(device),
    )


def kv_indices(
    block_tables: Tensor, block_size: int, lengths: list[int], contexts: list[int]
) -> Tensor:
    """Where in the cache the query tokens' keys and values go."""
    indices = []
    for table, length, context in zip(block_tables.tolist(), lengths, contexts, strict=True):
        for position in range(context - length, context):
            block, offset = divmod(position, block_size)
            indices.append(table[block] * block_size + offset)
    return torch.tensor(indices)


class PagedSequences:
    """Sequences with blocks taken at random, of which any may advance in a step."""

    def __init__(
        self,
        model: Model,
        sequences: list[list[int]],
        block_size: int,
        tp: TensorParallel | None = None,
    ) -> None:
        self.model = model
        self.tp = tp or TensorParallel()
        self.sequences = sequences
        self.block_size = block_size
        self.computed = [0] * len(sequences)
        shape = attention_shape(model.config, self.tp, block_size)
        most = -(-max(map(len, sequences)) // block_size)
        blocks = most * len(sequences)
        self.cache = allocate_kv_cache(model.config, shape, blocks, torch.float32, CPU)
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(0))
        self.block_tables = order.to(torch.int32).view(len(sequences), most)
        self.backend: AttentionBackend = SdpaBackend(shape)

    def step(self, chunks: dict[int, int]) -> dict[int, Tensor]:
        """Computes so many more tokens of each given sequence, in one batch.

        Returns the logits [tokens, vocab] of each.
        """
        order = sorted(chunks, key=lambda index: chunks[index] != 1)
        lengths = [chunks[index] for index in order]
        starts = [self.computed[index] for index in order]
        contexts = [start + length for start, length in zip(starts, lengths, strict=True)]
        tokens: list[int] = []
        positions: list[int] = []
        for index, start, end in zip(order, starts, contexts, strict=True):
            tokens += self.sequences[index][start:end]
            positions += range(start, end)
            self.computed[index] = end
        tables = self.block_tables[order]
        attention = self.backend.prepare(batch_metadata(tables, lengths, contexts))
        indices = kv_indices(tables, self.block_size, lengths, contexts)
        with torch.inference_mode():
            hidden = self.model.forward(
                torch.tensor(tokens), torch.tensor(positions), indices, attention, self.cache
            )
            logits = self.tp.all_gather(self.model.logits(hidden))[
                :, : self.model.config.vocab_size
            ]
        return dict(zip(order, torch.split(logits, lengths), strict=True))

    def run(self, chunk: int) -> list[Tensor]:
        """All tokens, every sequence `chunk` a step while it lasts. Returns logits by sequence."""
        parts: list[list[Tensor]] = [[] for _ in self.sequences]
        while left := {
            index: min(chunk, len(tokens) - self.computed[index])
            for index, tokens in enumerate(self.sequences)
            if len(tokens) > self.computed[index]
        }:
            for index, logits in self.step(left).items():
                parts[index].append(logits)
        return [torch.cat(part) for part in parts]


class RunAgain:
    """A double of a CUDA graph, for want of a GPU: a replay runs the step once more, on the buffers
    that it was captured with.

    Attributes:
        captured: how many graphs.
        replayed: which of these, one after the other.
    """

    def __init__(self) -> None:
        self.captured = 0
        self.replayed: list[int] = []

    def __call__(self, enqueue: Callable[[], T]) -> Callable[[], T]:
        number = self.captured
        self.captured += 1
        enqueue()

        def replay() -> T:
            self.replayed.append(number)
            return enqueue()

        return replay
