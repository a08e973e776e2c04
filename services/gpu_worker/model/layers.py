"""The layers of a dense Qwen3, each holding this rank's shard of its weights.

A layer's `checkpoint_tensors` says where each tensor of the checkpoint belongs; the loader needs
nothing else. Layers are built with uninitialized weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.layers.linear import Norm
from nanovllm.kernels.layers.ops import LayerOps
from nanovllm.services.gpu_worker.model.parallel import TensorParallel, VocabShard


class Factory(NamedTuple):
    """Where and as what a model's weights are made, and what computes on them there."""

    dtype: torch.dtype
    device: torch.device
    ops: LayerOps

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def norm(self, size: int, eps: float) -> Norm:
        return Norm(self.empty(size), eps)


class CheckpointTensor(NamedTuple):
    """Where this rank's part of a tensor of the checkpoint goes.

    Attributes:
        name: its name in the checkpoint.
        shape: its whole shape.
        target: the view to fill; as large as the part.
        dim: the dimension along which the part is cut out, or None for the whole tensor.
        start: the part's first index along `dim`.
    """

    name: str
    shape: tuple[int, ...]
    target: Tensor
    dim: int | None = None
    start: int = 0

    @classmethod
    def whole(cls, name: str, target: Tensor) -> CheckpointTensor:
        return cls(name, tuple(target.shape), target)


class Projection(NamedTuple):
    """One projection of a ColumnParallelLinear: rows of its weight.

    Attributes:
        name: in the checkpoint, under the layer's prefix.
        size: rows of the whole projection.
        local_size: rows of this rank's part.
        start: the first of them.
    """

    name: str
    size: int
    local_size: int
    start: int


class ColumnParallelLinear:
    """Projections of the normalized residual stream, as one matrix; each rank has some outputs of
    each. Where gated, the first one's give silu(gate) * up with the second's."""

    def __init__(
        self,
        norm: Norm,
        projections: list[Projection],
        bias: bool,
        gated: bool,
        factory: Factory,
    ) -> None:
        self.norm = norm
        outputs = sum(projection.local_size for projection in projections)
        self.projections = projections
        self.weight = factory.empty(outputs, len(self.norm.weight))
        self.bias = factory.empty(outputs) if bias else None
        self.gated = gated
        self.ops = factory.ops

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the projections and the stream, see `kernels.layers.ops`."""
        return self.ops.norm_linear(x, residual, self.norm, self.weight, self.bias, self.gated)

    def checkpoint_tensors(self, prefix: str) -> Iterator[CheckpointTensor]:
        sizes = [projection.local_size for projection in self.projections]
        for kind, held in (("weight", self.weight), ("bias", self.bias)):
            if held is None:
                continue
            for projection, target in zip(self.projections, torch.split(held, sizes), strict=True):
                yield CheckpointTensor(
                    name=f"{prefix}.{projection.name}.{kind}",
                    shape=(projection.size, *held.shape[1:]),
                    target=target,
                    dim=0,
                    start=projection.start,
                )


class RowParallelLinear:
    """A projection into the residual stream whose inputs are spread over the ranks; its output is
    their sum."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool, tp: TensorParallel, factory: Factory
    ) -> None:
        self.inputs = inputs
        self.tp = tp
        self.weight = factory.empty(outputs, inputs // tp.size)
        self.bias = factory.empty(outputs) if bias else None
        self.ops = factory.ops

    def __call__(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the stream, see `kernels.layers.ops`."""
        if self.tp.size == 1:
            return self.ops.linear_add(x, self.weight, self.bias, residual)
        total = self.tp.all_reduce(F.linear(x, self.weight))
        return (total if self.bias is None else total + self.bias), residual

    def checkpoint_tensors(self, name: str) -> Iterator[CheckpointTensor]:
        outputs, local = self.weight.shape
        yield CheckpointTensor(
            f"{name}.weight", (outputs, self.inputs), self.weight, 1, self.tp.rank * local
        )
        if self.bias is not None:
            yield CheckpointTensor.whole(f"{name}.bias", self.bias)


class VocabParallelMatrix:
    """A row for each token id, as embedding, as head, or both: rank r has the ids from
    r * shard up to (r + 1) * shard. Where TP does not divide the vocabulary, the last shards are
    padded with zeros."""

    def __init__(self, vocab_size: int, width: int, tp: TensorParallel, factory: Factory) -> None:
        self.vocab_size = vocab_size
        self.tp = tp
        self.shard = -(-vocab_size // tp.size)
        self.start = tp.rank * self.shard
        self.ids = VocabShard(tp, self.start)
        self.rows = max(0, min(self.shard, vocab_size - self.start))
        self.weight = factory.empty(self.shard, width)
        self.weight[self.rows :].zero_()

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [T], each in the vocabulary. Returns [T, width]."""
        if self.tp.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.start
        elsewhere = (local < 0) | (local >= self.shard)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.tp.all_reduce(rows.masked_fill(elsewhere[:, None], 0))

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [rows, width]. Returns [rows, shard], in `out` if given: those of this rank's ids,
        and -inf where the shard is padded."""
        local = torch.mm(hidden, self.weight.t(), out=out)
        if self.rows < self.shard:
            local[:, self.rows :] = -torch.inf
        return local

    def checkpoint_tensors(self, name: str) -> Iterator[CheckpointTensor]:
        shape = (self.vocab_size, self.weight.shape[1])
        yield CheckpointTensor(
            f"{name}.weight", shape, self.weight[: self.rows], 0, min(self.start, self.vocab_size)
        )
