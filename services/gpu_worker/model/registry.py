"""What a model is to the worker, and which model serves which family.

A further family is a file beside this one and a line in MODELS. The family's config.json is read
without torch in `nanovllm.checkpoint`, whose FAMILIES names every family too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nanovllm.checkpoint import ModelConfig
from nanovllm.kernels.attention.interface import AttentionBatch, LayerCache
from nanovllm.services.gpu_worker.model.layers import CheckpointTensor, VocabParallelMatrix
from nanovllm.services.gpu_worker.model.parallel import TensorParallel
from nanovllm.services.gpu_worker.model.qwen2 import Qwen2ForCausalLM
from nanovllm.services.gpu_worker.model.qwen3 import Qwen3ForCausalLM


class Model(Protocol):
    """One rank's shard of a model."""

    config: ModelConfig
    head: VocabParallelMatrix

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_indices: Tensor,
        attention: AttentionBatch,
        kv_cache: Sequence[LayerCache],
    ) -> Tensor:
        """Runs T tokens of a ragged batch, and stores their keys and values.

        Args:
            token_ids: int64 [T].
            positions: int64 [T], each token's index in its sequence.
            kv_indices: int64 [T], where in the cache a token's key and value go, see `store_kv`.
            attention: the batch, prepared by a backend.
            kv_cache: one for each layer.

        Returns:
            [T, hidden_size], normalized: the input of `logits`.
        """

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [rows, hidden_size]. Returns [rows, shard], in `out` if given: the logits of this
        rank's part of the vocabulary, see `VocabParallelMatrix.logits`."""

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        """Every tensor that the checkpoint must have, and where this rank's part goes."""


MODELS: dict[
    str, Callable[[ModelConfig, int, TensorParallel, torch.dtype, torch.device], Model]
] = {
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
}


def build_model(
    config: ModelConfig,
    max_model_len: int,
    tp: TensorParallel,
    dtype: torch.dtype,
    device: torch.device,
) -> Model:
    """This rank's shard, its weights not yet initialized.

    Args:
        max_model_len: one more than the highest position.

    Raises:
        CheckpointError: if the model cannot be cut into `tp.size` ranks.
    """
    return MODELS[config.model_type](config, max_model_len, tp, dtype, device)
