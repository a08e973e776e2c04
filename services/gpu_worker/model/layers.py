"""The layers that models are made of. A layer holds this rank's shard of its weights.

A layer is built with uninitialized weights. The layer's `checkpoint_tensors` says where in them
each tensor of the checkpoint belongs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.checkpoint import ModelConfig
from nanovllm.checkpoint.rope import LinearRope, Llama3Rope, Rope, YarnRope
from nanovllm.kernels.attention.interface import Parts
from nanovllm.kernels.layers.fp8 import Fp8Weight
from nanovllm.kernels.layers.ops import LayerOps, Norm, Weight, split
from nanovllm.services.gpu_worker.model.parallel import TensorParallel, VocabShard


class Factory(NamedTuple):
    """Makes weights of one dtype on one device, those of projections in FP8 if `fp8`. `ops` are the
    fastest layer ops there."""

    dtype: torch.dtype
    device: torch.device
    ops: LayerOps
    fp8: bool

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def projection(self, outputs: int, inputs: int) -> Weight:
        if self.fp8:
            return Fp8Weight.empty(outputs, inputs, self.device)
        return self.empty(outputs, inputs)

    def norm(self, size: int, eps: float) -> Norm:
        return Norm(self.empty(size), eps)


class CheckpointTensor(NamedTuple):
    """Where this rank's part of one tensor of the checkpoint goes."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    target: Weight  # the view of a weight to fill, as large as the part
    dim: int | None = None  # along which the part is cut out; None if it is the whole tensor
    start: int = 0  # the part's first index along `dim`
    projection: bool = (
        False  # whether it is the weight of a projection, which FP8 models have in FP8
    )

    @classmethod
    def whole(cls, name: str, target: Tensor) -> CheckpointTensor:
        return cls(name, tuple(target.shape), target)


class Projection(NamedTuple):
    """One projection of a ColumnParallelLinear: some rows of its weight."""

    name: str  # in the checkpoint, after the layer's prefix
    size: int  # rows of the whole projection
    local_size: int  # rows of this rank's part
    start: int  # the first row of this rank's part


class ColumnParallelLinear:
    """Projections of the normalized residual stream, as one matrix. A rank computes some outputs of
    each projection. If `gated`, there are two projections, and the output is silu(first) * second.
    """

    def __init__(
        self,
        norm: Norm,
        projections: list[Projection],
        bias: bool,
        gated: bool,
        tp: TensorParallel,
        factory: Factory,
    ) -> None:
        self.norm = norm
        self.tp = tp
        outputs = sum(projection.local_size for projection in projections)
        self.projections = projections
        self.weight = factory.projection(outputs, len(self.norm.weight))
        self.bias = factory.empty(outputs) if bias else None
        self.gated = gated
        self.ops = factory.ops

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Takes the residual stream as `RowParallelLinear` returns it. Returns the projections, and
        the stream as `kernels.layers.ops` has it."""
        weights = self.weight, self.bias, self.gated
        if self.tp.size > 1 and self.ops.fuses_norm(len(x), *weights):
            x, residual = self.tp.add(x, residual), None
        elif self.tp.size > 1:
            normed, stream = self.tp.add_rms_norm(x, residual, self.norm, self.ops)
            return self.ops.linear(normed, *weights), stream
        return self.ops.norm_linear(x, residual, self.norm, *weights)

    def checkpoint_tensors(self, prefix: str) -> Iterator[CheckpointTensor]:
        sizes = [projection.local_size for projection in self.projections]
        biases = [None] * len(sizes) if self.bias is None else torch.split(self.bias, sizes)
        for projection, weight, bias in zip(
            self.projections, split(self.weight, sizes), biases, strict=True
        ):
            name, (size, start) = f"{prefix}.{projection.name}", (projection.size, projection.start)
            shape = size, len(self.norm.weight)
            yield CheckpointTensor(f"{name}.weight", shape, weight, 0, start, projection=True)
            if bias is not None:
                yield CheckpointTensor(f"{name}.bias", (size,), bias, 0, start)


class RowParallelLinear:
    """A projection into the residual stream. A rank has some of the inputs, and the output is the
    sum over the ranks. `TensorParallel.add_rms_norm` adds it up, with the next norm."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool, tp: TensorParallel, factory: Factory
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.tp = tp
        self.weight = factory.projection(outputs, inputs // tp.size)
        self.bias = factory.empty(outputs) if bias else None
        self.ops = factory.ops

    def __call__(self, x: Tensor | Parts, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the residual stream, see `kernels.layers.ops`, with this rank's part of what is
        to be added."""
        if self.tp.size == 1:
            return self.ops.linear_add(x, self.weight, self.bias, residual)
        bias = self.bias if self.tp.rank == 0 else None
        return self.ops.linear(x, self.weight, bias), residual

    def checkpoint_tensors(self, name: str) -> Iterator[CheckpointTensor]:
        start = self.tp.rank * (self.inputs // self.tp.size)
        shape = self.outputs, self.inputs
        yield CheckpointTensor(f"{name}.weight", shape, self.weight, 1, start, projection=True)
        if self.bias is not None:
            yield CheckpointTensor.whole(f"{name}.bias", self.bias)


class VocabParallelMatrix:
    """A row of weights for each token id, used as embedding, as head, or as both.

    Rank r has the ids from r * shard up to (r + 1) * shard. If the ranks do not divide the
    vocabulary, the last shards are padded with zeros.
    """

    def __init__(self, vocab_size: int, width: int, tp: TensorParallel, factory: Factory) -> None:
        self.vocab_size = vocab_size
        self.tp = tp
        self._ops = factory.ops
        self.shard = -(-vocab_size // tp.size)
        self.start = tp.rank * self.shard
        self.ids = VocabShard(tp, self.start)
        self.rows = max(0, min(self.shard, vocab_size - self.start))
        self.weight = factory.empty(self.shard, width)
        self.weight[self.rows :].zero_()

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [rows, width]. Returns [rows, shard], in `out` if given: the logits of this rank's
        ids, and -inf where the shard is padded."""
        local = self._ops.logits(hidden, self.weight, out)
        if self.rows < self.shard:
            local[:, self.rows :] = -torch.inf
        return local

    def checkpoint_tensors(self, name: str) -> Iterator[CheckpointTensor]:
        shape = (self.vocab_size, self.weight.shape[1])
        yield CheckpointTensor(
            f"{name}.weight", shape, self.weight[: self.rows], 0, min(self.start, self.vocab_size)
        )


def rotations(config: ModelConfig, max_model_len: int, device: torch.device) -> Tensor:
    """Rotary position embedding: of every position below `max_model_len` the cosines, then the
    sines, float32 [max_model_len, head_dim]."""
    frequencies, scale = rope_frequencies(config.rope, config.head_dim)
    positions = torch.arange(max_model_len, dtype=torch.float32, device=device)
    angles = positions[:, None] * frequencies.to(device)
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * scale


def rope_frequencies(rope: Rope, head_dim: int) -> tuple[Tensor, float]:
    """Angular frequencies, float32 [head_dim / 2], and the factor on cosines and sines."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.rope_theta**exponents
    match rope:
        case LinearRope():
            return frequencies / rope.factor, 1.0
        case Llama3Rope():
            return _llama3(frequencies, rope), 1.0
        case YarnRope():
            return _yarn(frequencies, rope), _yarn_attention_factor(rope)
        case _:
            return frequencies, 1.0


def _llama3(frequencies: Tensor, rope: Llama3Rope) -> Tensor:
    low, high = rope.low_freq_factor, rope.high_freq_factor
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / rope.factor)


def _yarn(frequencies: Tensor, rope: YarnRope) -> Tensor:
    pairs = len(frequencies)

    def dimension(turns: float) -> float:
        """Which pair of dimensions (a fraction) turns so often within the original length."""
        length = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return pairs * math.log(length) / math.log(rope.rope_theta)

    first, last = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    places = torch.arange(pairs, dtype=torch.float32)
    divided = ((places - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequencies * (1 - divided) + frequencies / rope.factor * divided


def _yarn_attention_factor(rope: YarnRope) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
