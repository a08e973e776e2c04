"""Qwen2 and Qwen2.5, dense (Qwen Team, 2024, "Qwen2.5 Technical Report")."""

from __future__ import annotations

from nanovllm.checkpoint import ModelConfig
from nanovllm.kernels.layers.ops import Norm
from nanovllm.services.gpu_worker.model.decoder import Attention, Decoder
from nanovllm.services.gpu_worker.model.layers import Factory
from nanovllm.services.gpu_worker.model.parallel import TensorParallel


class Qwen2ForCausalLM(Decoder):
    """Queries, keys and values have biases; nothing normalizes queries and keys."""

    @staticmethod
    def attention(
        config: ModelConfig, norm: Norm, tp: TensorParallel, factory: Factory
    ) -> Attention:
        return Attention(config, norm, tp, factory, qkv_bias=True, out_bias=False, qk_norm=False)
