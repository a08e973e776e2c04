"""Sampling in plain torch: what the kernels are tested against, and what a CPU runs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.sampling.stream import exponential_noise, stream_keys

# Logits are divided by no less: below, only the likeliest has a chance, and 1 / t might overflow.
MIN_TEMPERATURE = 1e-6
# Rows are handled so many at a time that their temporaries hold about so many elements.
CHUNK_ELEMENTS = 1 << 20


class SamplingTensors(NamedTuple):
    """Parameters of n rows, each a tensor [n] on the device.

    Attributes:
        temperature: float32; 0 takes the likeliest token, the lowest id of equals.
        top_k: int32; 0 is off.
        top_p: float32; 1 is off.
        min_p: float32; 0 is off.
        seed: int64.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor


def sample(logits: Tensor, params: SamplingTensors, positions: Tensor) -> Tensor:
    """The next token of each row: temperature first, then top-k, top-p and min-p.

    Looks at the parameters on the host, to do no more than they ask for.

    Args:
        logits: [n, vocab] of any float dtype; not changed.
        positions: int64 [n], the index in its sequence that the sampled token will have.

    Returns:
        int64 [n].
    """
    random = params.temperature > 0
    filtered = random & ((params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0))
    if not random.any():
        return logits.argmax(dim=-1)
    any_filtered = bool(filtered.any())
    rows, vocab = logits.shape
    chunk = max(1, CHUNK_ELEMENTS // vocab)
    keys = stream_keys(params.seed, positions)
    sampled = torch.empty(rows, dtype=torch.int64, device=logits.device)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        scores = temper(logits[part], params.temperature[part, None])
        if any_filtered:
            kept = filter_mask(
                scores, params.top_k[part, None], params.top_p[part, None], params.min_p[part, None]
            )
            scores.masked_fill_(~kept, -torch.inf)
        scores -= exponential_noise(keys[part], vocab).log_()
        sampled[part] = torch.where(random[part, None], scores, logits[part].float()).argmax(-1)
    return sampled


def temper(logits: Tensor, temperature: Tensor) -> Tensor:
    """The scores float32 [n, vocab] of logits at the temperatures [n, 1]."""
    return logits.float() * temperature.clamp_min(MIN_TEMPERATURE).reciprocal()


def filter_mask(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which tokens each row may draw: never none.

    Top-k keeps the k likeliest; top-p, of those and renormalized, the fewest whose probabilities
    reach p together; min-p those at least so likely as min_p times the likeliest. Of equally
    likely tokens the lowest ids are kept.

    Args:
        scores: float32 [n, vocab], logits over temperature.
        top_k, top_p, min_p: [n, 1], as in `SamplingTensors`.

    Returns:
        bool [n, vocab].
    """
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(scores.shape[1], device=scores.device)
    in_top_k = (top_k == 0) | (ranks < top_k)
    probabilities = ordered.masked_fill(~in_top_k, -torch.inf).softmax(dim=-1)
    likelier = F.pad(probabilities.cumsum(dim=-1)[:, :-1], (1, 0))  # sum over likelier tokens
    in_top_p = (top_p >= 1) | (likelier < top_p)
    in_min_p = (min_p == 0) | (probabilities >= min_p * probabilities[:, :1])
    kept = (in_top_k & in_top_p & in_min_p) | (ranks == 0)
    return torch.empty_like(kept).scatter_(1, order, kept)
