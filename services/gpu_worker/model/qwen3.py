"""Qwen3, dense (Qwen Team, 2025, "Qwen3 Technical Report")."""

from __future__ import annotations

from nanovllm.checkpoint import ModelConfig
from nanovllm.kernels.layers.ops import Norm
from nanovllm.services.gpu_worker.model.decoder import Attention, Decoder
from nanovllm.services.gpu_worker.model.layers import Factory
from nanovllm.services.gpu_worker.model.parallel import TensorParallel


class Qwen3ForCausalLM(Decoder):
    """Queries and keys are normalized; all of attention's projections have biases or none has."""

    @staticmethod
    def attention(
        config: ModelConfig, norm: Norm, tp: TensorParallel, factory: Factory
    ) -> Attention:
        bias = config.attention_bias
        return Attention(config, norm, tp, factory, qkv_bias=bias, out_bias=bias, qk_norm=True)
