"""Sampling on the device: from logits to token ids, and their log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels.sampling.ops import choose_sampling_ops
from nanovllm.kernels.sampling.reference import SamplingTensors
from nanovllm.services.gpu_worker import vocab_parallel
from nanovllm.services.gpu_worker.model.parallel import VocabShard


def sample(
    logits: Tensor, params: SamplingTensors, positions: Tensor, ids: VocabShard, wide: bool
) -> Tensor:
    """The next token of each row, as `reference.sample` says, the same on every rank.

    Args:
        logits: [n, shard], this rank's: of `ids`.
        wide: see `Batch.wide`.
    """
    ops = choose_sampling_ops(logits.device)
    if ids.tp.size > 1:
        return vocab_parallel.sample(logits, params, positions, ids, wide, ops)
    return ops.sample(logits, params, positions)


def logprobs(logits: Tensor, token_ids: Tensor, k: int, ids: VocabShard) -> tuple[Tensor, Tensor]:
    """Log-softmax of the raw logits: of the chosen token, then of the k likeliest.

    Args:
        logits: [n, shard] of any float dtype, this rank's: of `ids`.
        token_ids: int64 [n], the chosen ones.
        k: 0 up to the vocabulary's size.

    Returns:
        ids int64 [n, k + 1] and values float32 [n, k + 1].
    """
    if ids.tp.size > 1:
        return vocab_parallel.logprobs(logits, token_ids, k, ids)
    values = logits.log_softmax(dim=-1, dtype=torch.float32)
    chosen = token_ids[:, None]
    top_values, top_ids = values.topk(k, dim=-1)
    return (
        torch.cat((chosen, top_ids), dim=-1),
        torch.cat((values.gather(1, chosen), top_values), dim=-1),
    )
