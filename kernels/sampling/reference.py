"""Sampling in plain torch: what the kernels are tested against, and what a CPU runs."""

from __future__ import annotations

from collections.abc import Iterator
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
    filtered = filters(params)
    keys = stream_keys(params.seed, positions)
    if not filtered.any():
        return noisy_best(logits, params.temperature, keys)[1]
    rows, vocab = logits.shape
    sampled = torch.empty(rows, dtype=torch.int64, device=logits.device)
    for part in _parts(rows, vocab):
        temperature = params.temperature[part]
        kept = filter_mask(
            temper(logits[part], temperature),
            params.top_k[part, None],
            params.top_p[part, None],
            params.min_p[part, None],
        )
        left = logits[part].masked_fill(~kept, -torch.inf)
        sampled[part] = noisy_best(left, temperature, keys[part])[1]
    return sampled


def filters(params: SamplingTensors) -> Tensor:
    """Which rows have a filter that matters: bool [n]."""
    on = (params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0)
    return on & (params.temperature > 0)


def noisy_best(
    logits: Tensor, temperature: Tensor, keys: Tensor, first: int = 0
) -> tuple[Tensor, Tensor]:
    """The highest score + noise, or at temperature 0 logit, of each row: float32 [n], and its
    column, int64 [n]. Column c is token first + c.

    Args:
        logits: [n, c].
        temperature: [n].
        keys: int64 [n], see `stream_keys`.
    """
    rows, columns = logits.shape
    random = temperature > 0
    if not random.any():
        best, where = logits.max(dim=-1)
        return best.float(), where
    best = torch.empty(rows, dtype=torch.float32, device=logits.device)
    where = torch.empty(rows, dtype=torch.int64, device=logits.device)
    for part in _parts(rows, columns):
        noisy = temper(logits[part], temperature[part])
        noisy -= exponential_noise(keys[part], columns, first).log_()
        values = torch.where(random[part, None], noisy, logits[part].float())
        torch.max(values, dim=-1, out=(best[part], where[part]))
    return best, where


def temper(logits: Tensor, temperature: Tensor) -> Tensor:
    """The scores float32 [n, vocab] of logits at the temperatures [n]."""
    return logits.float() * temperature[:, None].clamp_min(MIN_TEMPERATURE).reciprocal()


def _parts(rows: int, columns: int) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // columns)
    return (slice(start, start + size) for start in range(0, rows, size))


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
