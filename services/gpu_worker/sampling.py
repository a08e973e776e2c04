"""Sampling on the device: from logits to token ids, and their log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels.sampling import reference
from nanovllm.kernels.sampling.reference import SamplingTensors


def sample(logits: Tensor, params: SamplingTensors, positions: Tensor) -> Tensor:
    """The next token of each row, as `reference.sample` says; on CUDA by the fused kernels, which
    look at nothing on the host."""
    if logits.device.type == "cuda":
        from nanovllm.kernels.sampling import fused

        return fused.sample(logits, params, positions)
    return reference.sample(logits, params, positions)


def logprobs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-softmax of the raw logits: of the chosen token, then of the k likeliest.

    Args:
        logits: [n, vocab] of any float dtype.
        token_ids: int64 [n], the chosen ones.
        k: 0 up to the vocabulary's size.

    Returns:
        ids int64 [n, k + 1] and values float32 [n, k + 1].
    """
    values = logits.log_softmax(dim=-1, dtype=torch.float32)
    chosen = token_ids[:, None]
    top_values, top_ids = values.topk(k, dim=-1)
    ids = torch.cat((chosen, top_ids), dim=-1)
    return ids, torch.cat((values.gather(1, chosen), top_values), dim=-1)
