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
from nanovllm.kernels.layers.ops import choose_ops
from nanovllm.services.gpu_worker.model.layers import (
    CheckpointTensor,
    ColumnParallelLinear,
    Factory,
    Projection,
    RMSNorm,
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
        self.rotary = RotaryEmbedding(config, max_model_len, device)
        self.embedding = VocabParallelMatrix(config.vocab_size, config.hidden_size, tp, factory)
        self.layers = [_DecoderLayer(config, tp, factory) for _ in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, factory)
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
        rotation = self.rotary(positions)
        x, residual = self.embedding.embed(token_ids), None
        for layer, cache in zip(self.layers, kv_cache, strict=True):
            x, residual = layer.forward(x, residual, rotation, slot_mapping, attention, cache)
        return self.norm.add(x, residual)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden_size]. Returns [rows, vocab_size], the same on every rank: each
        samples from the same numbers."""
        return self.head.logits(hidden)

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        """Every tensor that the checkpoint must have, and where this rank's part goes."""
        yield from self.embedding.checkpoint_tensors("model.embed_tokens")
        for index, layer in enumerate(self.layers):
            yield from layer.checkpoint_tensors(f"model.layers.{index}")
        yield from self.norm.checkpoint_tensors("model.norm")
        if self.head is not self.embedding:
            yield from self.head.checkpoint_tensors("lm_head")


class _DecoderLayer:
    def __init__(self, config: ModelConfig, tp: TensorParallel, factory: Factory) -> None:
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, factory)
        self.attention = _Attention(config, tp, factory)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, factory)
        self.mlp = _Mlp(config, tp, factory)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        rotation: Tensor,
        slot_mapping: Tensor,
        attention: AttentionBatch,
        cache: LayerCache,
    ) -> tuple[Tensor, Tensor]:
        """Args: x [T, hidden_size], what the layer before has yet to add to the residual stream;
        there is no stream before the first. Returns the same for the layer after."""
        x, residual = self.input_norm.add(x, residual)
        x = self.attention.forward(x, rotation, slot_mapping, attention, cache)
        x, residual = self.post_attention_norm.add(x, residual)
        return self.mlp.forward(x), residual

    def checkpoint_tensors(self, prefix: str) -> Iterator[CheckpointTensor]:
        yield from self.input_norm.checkpoint_tensors(f"{prefix}.input_layernorm")
        yield from self.attention.checkpoint_tensors(f"{prefix}.self_attn")
        yield from self.post_attention_norm.checkpoint_tensors(f"{prefix}.post_attention_layernorm")
        yield from self.mlp.checkpoint_tensors(f"{prefix}.mlp")


class _Attention:
    def __init__(self, config: ModelConfig, tp: TensorParallel, factory: Factory) -> None:
        heads = local_heads(config, tp)
        width = config.head_dim

        def projection(name: str, total: int, local: int, first: int) -> Projection:
            return Projection(name, total * width, local * width, first * width)

        kv = (config.num_key_value_heads, heads.num_kv, heads.first_kv)
        self.ops = factory.ops
        self.qkv = ColumnParallelLinear(
            [
                projection("q_proj", config.num_attention_heads, heads.num, heads.first),
                projection("k_proj", *kv),
                projection("v_proj", *kv),
            ],
            inputs=config.hidden_size,
            bias=config.attention_bias,
            factory=factory,
        )
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, factory)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, factory)
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
        rotation: Tensor,
        slot_mapping: Tensor,
        attention: AttentionBatch,
        cache: LayerCache,
    ) -> Tensor:
        q = self.ops.norm_rope_store(
            self.qkv(x),
            self.q_norm.weight,
            self.k_norm.weight,
            self.q_norm.eps,
            rotation,
            cache,
            slot_mapping,
        )
        return self.out(attention.forward(q, cache).flatten(1))

    def checkpoint_tensors(self, prefix: str) -> Iterator[CheckpointTensor]:
        yield from self.qkv.checkpoint_tensors(prefix)
        yield from self.q_norm.checkpoint_tensors(f"{prefix}.q_norm")
        yield from self.k_norm.checkpoint_tensors(f"{prefix}.k_norm")
        yield from self.out.checkpoint_tensors(f"{prefix}.o_proj")


class _Mlp:
    def __init__(self, config: ModelConfig, tp: TensorParallel, factory: Factory) -> None:
        size = config.intermediate_size
        local = size // tp.size
        self.ops = factory.ops
        self.gate_up = ColumnParallelLinear(
            [Projection(name, size, local, tp.rank * local) for name in ("gate_proj", "up_proj")],
            inputs=config.hidden_size,
            bias=False,
            factory=factory,
        )
        self.down = RowParallelLinear(size, config.hidden_size, bias=False, tp=tp, factory=factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.ops.silu_mul(self.gate_up(x)))

    def checkpoint_tensors(self, prefix: str) -> Iterator[CheckpointTensor]:
        yield from self.gate_up.checkpoint_tensors(prefix)
        yield from self.down.checkpoint_tensors(f"{prefix}.down_proj")
