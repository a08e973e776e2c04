"""A dense decoder: layers of grouped-query attention and a SwiGLU MLP, each after an RMSNorm.

A family of models (`qwen2.py`, `qwen3.py`) is a subclass that says which attention its layers have.
A model is built and filled so:

    model = build_model(config, max_model_len, tp, dtype, device)  # uninitialized weights
    load_checkpoint(model, directory, progress)
    hidden = model.forward(token_ids, positions, kv_indices, attention, kv_cache)
    logits = model.logits(hidden[rows])

A forward pass reads nothing back from the device, and none of its shapes depends on a value there,
so that a step can be captured in a CUDA graph. Run a forward pass under `torch.inference_mode()`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nanovllm.checkpoint import ModelConfig
from nanovllm.kernels.attention.interface import AttentionBatch, LayerCache
from nanovllm.kernels.layers.ops import Embedding, Heads, Norm, choose_ops, has_fp8
from nanovllm.services.gpu_worker.model.layers import (
    CheckpointTensor,
    ColumnParallelLinear,
    Factory,
    Projection,
    RowParallelLinear,
    VocabParallelMatrix,
    rotations,
)
from nanovllm.services.gpu_worker.model.parallel import TensorParallel, local_heads


class Decoder(ABC):
    """This rank's shard of the model. Implements `registry.Model`."""

    def __init__(
        self,
        config: ModelConfig,
        max_model_len: int,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocates the weights, see `registry.build_model`."""
        config.check_tensor_parallel(tp.size)
        factory = Factory(dtype, device, choose_ops(device), config.fp8 and has_fp8(device))
        self.config = config
        self.tp = tp
        self.ops = factory.ops
        self.embedding = VocabParallelMatrix(config.vocab_size, config.hidden_size, tp, factory)
        self.tables = Embedding(
            self.embedding.weight, self.embedding.start, rotations(config, max_model_len, device)
        )
        self.layers = [
            _Layer(config, self.attention, tp, factory) for _ in range(config.num_hidden_layers)
        ]
        self.norm = factory.norm(config.hidden_size, config.rms_norm_eps)
        self.head = (
            self.embedding
            if config.tie_word_embeddings
            else VocabParallelMatrix(config.vocab_size, config.hidden_size, tp, factory)
        )

    @staticmethod
    @abstractmethod
    def attention(
        config: ModelConfig, norm: Norm, tp: TensorParallel, factory: Factory
    ) -> Attention:
        """The attention of one layer, whose input `norm` normalizes."""

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_indices: Tensor,
        attention: AttentionBatch,
        kv_cache: Sequence[LayerCache],
    ) -> Tensor:
        x, rotation = self.ops.embed(token_ids, positions, self.tables)
        residual = None
        for layer, cache in zip(self.layers, kv_cache, strict=True):
            x, residual = layer.forward(x, residual, rotation, kv_indices, attention, cache)
        return self.tp.add_rms_norm(x, residual, self.norm, self.ops)[0]

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        return self.head.logits(hidden, out)

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        yield from self.embedding.checkpoint_tensors("model.embed_tokens")
        for index, layer in enumerate(self.layers):
            yield from layer.checkpoint_tensors(f"model.layers.{index}")
        yield CheckpointTensor.whole("model.norm.weight", self.norm.weight)
        if self.head is not self.embedding:
            yield from self.head.checkpoint_tensors("lm_head")


class _Layer:
    def __init__(
        self,
        config: ModelConfig,
        attention: Callable[[ModelConfig, Norm, TensorParallel, Factory], Attention],
        tp: TensorParallel,
        factory: Factory,
    ) -> None:
        self.input_norm = factory.norm(config.hidden_size, config.rms_norm_eps)
        self.attention = attention(config, self.input_norm, tp, factory)
        self.post_attention_norm = factory.norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _Mlp(config, self.post_attention_norm, tp, factory)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        rotation: Tensor,
        kv_indices: Tensor,
        attention: AttentionBatch,
        cache: LayerCache,
    ) -> tuple[Tensor, Tensor | None]:
        """Takes and returns the residual stream as two tensors, see `RowParallelLinear`."""
        x, residual = self.attention.forward(x, residual, rotation, kv_indices, attention, cache)
        return self.mlp.forward(x, residual)

    def checkpoint_tensors(self, prefix: str) -> Iterator[CheckpointTensor]:
        yield CheckpointTensor.whole(f"{prefix}.input_layernorm.weight", self.input_norm.weight)
        yield from self.attention.checkpoint_tensors(f"{prefix}.self_attn")
        yield CheckpointTensor.whole(
            f"{prefix}.post_attention_layernorm.weight", self.post_attention_norm.weight
        )
        yield from self.mlp.checkpoint_tensors(f"{prefix}.mlp")


class Attention:
    """Grouped-query attention with rotary positions.

    Args:
        norm: normalizes the input.
        qkv_bias: whether the projections to queries, keys and values have biases.
        out_bias: whether the projection of the output has one.
        qk_norm: whether the queries and keys of each head are normalized.
    """

    def __init__(
        self,
        config: ModelConfig,
        norm: Norm,
        tp: TensorParallel,
        factory: Factory,
        *,
        qkv_bias: bool,
        out_bias: bool,
        qk_norm: bool,
    ) -> None:
        heads = local_heads(config, tp)
        width = config.head_dim

        def projection(name: str, total: int, local: int, first: int) -> Projection:
            return Projection(name, total * width, local * width, first * width)

        kv = (config.num_key_value_heads, heads.num_kv, heads.first_kv)
        self.ops = factory.ops
        self.qkv = ColumnParallelLinear(
            norm,
            [
                projection("q_proj", config.num_attention_heads, heads.num, heads.first),
                projection("k_proj", *kv),
                projection("v_proj", *kv),
            ],
            bias=qkv_bias,
            gated=False,
            tp=tp,
            factory=factory,
        )
        self.q_norm = factory.norm(width, config.rms_norm_eps) if qk_norm else None
        self.k_norm = factory.norm(width, config.rms_norm_eps) if qk_norm else None
        self.out = RowParallelLinear(
            config.num_attention_heads * width,
            config.hidden_size,
            bias=out_bias,
            tp=tp,
            factory=factory,
        )
        self.joins = factory.ops.joins(self.out.weight, self.out.bias)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        rotation: Tensor,
        kv_indices: Tensor,
        attention: AttentionBatch,
        cache: LayerCache,
    ) -> tuple[Tensor, Tensor | None]:
        qkv, stream = self.qkv(x, residual)
        heads = Heads(qkv, self.q_norm, self.k_norm, rotation, cache, kv_indices)
        return self.out(self.ops.attend(heads, attention, self.joins), stream)

    def checkpoint_tensors(self, prefix: str) -> Iterator[CheckpointTensor]:
        yield from self.qkv.checkpoint_tensors(prefix)
        for name, norm in (("q_norm", self.q_norm), ("k_norm", self.k_norm)):
            if norm is not None:
                yield CheckpointTensor.whole(f"{prefix}.{name}.weight", norm.weight)
        yield from self.out.checkpoint_tensors(f"{prefix}.o_proj")


class _Mlp:
    def __init__(
        self, config: ModelConfig, norm: Norm, tp: TensorParallel, factory: Factory
    ) -> None:
        size = config.intermediate_size
        local = size // tp.size
        self.gate_up = ColumnParallelLinear(
            norm,
            [Projection(name, size, local, tp.rank * local) for name in ("gate_proj", "up_proj")],
            bias=False,
            gated=True,
            tp=tp,
            factory=factory,
        )
        self.down = RowParallelLinear(size, config.hidden_size, bias=False, tp=tp, factory=factory)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.down(*self.gate_up(x, residual))

    def checkpoint_tensors(self, prefix: str) -> Iterator[CheckpointTensor]:
        yield from self.gate_up.checkpoint_tensors(prefix)
        yield from self.down.checkpoint_tensors(f"{prefix}.down_proj")
