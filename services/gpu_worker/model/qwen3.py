"""Qwen3, dense: decoder layers with grouped-query attention, q/k norm and a SwiGLU MLP.

    model = Qwen3ForCausalLM(config, max_model_len, tp, dtype, device)  # uninitialized
    load_checkpoint(model, directory, progress)                         # see loader.py
    hidden = model.forward(token_ids, positions, slot_mapping, attention, kv_cache)
    logits = model.logits(hidden[rows])

Everything that a forward pass needs is passed to it; nothing reads a value back from the device,
and no shape depends on one, so that a step can be captured in a CUDA graph. Call it under
`torch.inference_mode()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nanovllm.checkpoint import ModelConfig
from nanovllm.kernels.attention.interface import AttentionBatch, LayerCache
from nanovllm.kernels.layers.linear import Norm
from nanovllm.kernels.layers.ops import choose_ops
from nanovllm.services.gpu_worker.model.layers import (
    CheckpointTensor,
    ColumnParallelLinear,
    Factory,
    Projection,
    RowParallelLinear,
    VocabParallelMatrix,
)
from nanovllm.services.gpu_worker.model.parallel import TensorParallel, local_heads
from nanovllm.services.gpu_worker.model.rope import RotaryEmbedding


class Qwen3ForCausalLM:
    """This rank's shard of the model."""

    def __init__(
        self,
        config: ModelConfig,
        max_model_len: int,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocates the weights, uninitialized.

        Args:
            max_model_len: one more than the highest position.

        Raises:
            CheckpointError: if the model cannot be cut into `tp.size` ranks, or its rope type is
                not served.
        """
        config.check_tensor_parallel(tp.size)
        factory = Factory(dtype, device, choose_ops(device))
        self.config = config
        self.ops = factory.ops
        self.rotary = RotaryEmbedding(config, max_model_len, device)
        self.embedding = VocabParallelMatrix(config.vocab_size, config.hidden_size, tp, factory)
        self.layers = [_DecoderLayer(config, tp, factory) for _ in range(config.num_hidden_layers)]
        self.norm = factory.norm(config.hidden_size, config.rms_norm_eps)
        self.head = (
            self.embedding
            if config.tie_word_embeddings
            else VocabParallelMatrix(config.vocab_size, config.hidden_size, tp, factory)
        )

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        attention: AttentionBatch,
        kv_cache: Sequence[LayerCache],
    ) -> Tensor:
        """Runs T tokens of a ragged batch, and stores their keys and values.

        Args:
            token_ids: int64 [T].
            positions: int64 [T], each token's index in its sequence.
            slot_mapping: int64 [T], where in the cache its key and value go, see `store_kv`.
            attention: the batch, prepared by a backend.
            kv_cache: one for each layer.

        Returns:
            [T, hidden_size], normalized: what `logits` takes.
        """
        # Before the embedding: the layers' kernels look ahead at it, see `kernels.overlap`.
        rotation = self.rotary(positions)
        x, residual = self.embedding.embed(token_ids), None
        for layer, cache in zip(self.layers, kv_cache, strict=True):
            x, residual = layer.forward(x, residual, rotation, slot_mapping, attention, cache)
        return self.ops.add_rms_norm(x, residual, self.norm)[0]

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [rows, hidden_size]. Returns [rows, shard], this rank's share of the vocabulary:
        see `VocabParallelMatrix.logits`."""
        return self.head.logits(hidden, out)

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        """Every tensor that the checkpoint must have, and where this rank's part goes."""
        yield from self.embedding.checkpoint_tensors("model.embed_tokens")
        for index, layer in enumerate(self.layers):
            yield from layer.checkpoint_tensors(f"model.layers.{index}")
        yield CheckpointTensor.whole("model.norm.weight", self.norm.weight)
        if self.head is not self.embedding:
            yield from self.head.checkpoint_tensors("lm_head")


class _DecoderLayer:
    def __init__(self, config: ModelConfig, tp: TensorParallel, factory: Factory) -> None:
        self.input_norm = factory.norm(config.hidden_size, config.rms_norm_eps)
        self.attention = _Attention(config, self.input_norm, tp, factory)
        self.post_attention_norm = factory.norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _Mlp(config, self.post_attention_norm, tp, factory)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        rotation: Tensor,
        slot_mapping: Tensor,
        attention: AttentionBatch,
        cache: LayerCache,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream before and after, see `kernels.layers.ops`."""
        x, residual = self.attention.forward(x, residual, rotation, slot_mapping, attention, cache)
        return self.mlp.forward(x, residual)

    def checkpoint_tensors(self, prefix: str) -> Iterator[CheckpointTensor]:
        yield CheckpointTensor.whole(f"{prefix}.input_layernorm.weight", self.input_norm.weight)
        yield from self.attention.checkpoint_tensors(f"{prefix}.self_attn")
        yield CheckpointTensor.whole(
            f"{prefix}.post_attention_layernorm.weight", self.post_attention_norm.weight
        )
        yield from self.mlp.checkpoint_tensors(f"{prefix}.mlp")


class _Attention:
    def __init__(
        self, config: ModelConfig, norm: Norm, tp: TensorParallel, factory: Factory
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
            bias=config.attention_bias,
            gated=False,
            factory=factory,
        )
        self.q_norm = factory.norm(config.head_dim, config.rms_norm_eps)
        self.k_norm = factory.norm(config.head_dim, config.rms_norm_eps)
        self.out = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=config.attention_bias,
            tp=tp,
            factory=factory,
        )

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        rotation: Tensor,
        slot_mapping: Tensor,
        attention: AttentionBatch,
        cache: LayerCache,
    ) -> tuple[Tensor, Tensor | None]:
        qkv, stream = self.qkv(x, residual)
        q = self.ops.norm_rope_store(qkv, self.q_norm, self.k_norm, rotation, cache, slot_mapping)
        return self.out(attention.forward(q, cache).flatten(1), stream)

    def checkpoint_tensors(self, prefix: str) -> Iterator[CheckpointTensor]:
        yield from self.qkv.checkpoint_tensors(prefix)
        yield CheckpointTensor.whole(f"{prefix}.q_norm.weight", self.q_norm.weight)
        yield CheckpointTensor.whole(f"{prefix}.k_norm.weight", self.k_norm.weight)
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
            factory=factory,
        )
        self.down = RowParallelLinear(size, config.hidden_size, bias=False, tp=tp, factory=factory)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.down(*self.gate_up(x, residual))

    def checkpoint_tensors(self, prefix: str) -> Iterator[CheckpointTensor]:
        yield from self.gate_up.checkpoint_tensors(prefix)
        yield from self.down.checkpoint_tensors(f"{prefix}.down_proj")
