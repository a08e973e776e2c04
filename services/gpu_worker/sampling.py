"""Sampling on the device: from logits to token ids, and their log-probabilities.

A token is drawn by the Gumbel-max trick: the likeliest after independent noise
G = -log(E), E = -log(1 - u), was added to each logit / temperature is a sample of their softmax
(Maddison et al., 2014, "A* Sampling"). The u are no generator's state but a pure function of
(seed, position, token id), as counter-based generators have it (Salmon et al., 2011, "Parallel
random numbers: as easy as 1, 2, 3"): the same alone and in a batch, on every rank, and over any
shard of the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits are divided by no less: below, only the likeliest has a chance, and 1 / t might overflow.
MIN_TEMPERATURE = 1e-6
# Rows are handled so many at a time that their temporaries hold about so many elements.
CHUNK_ELEMENTS = 1 << 20
# Scales [0, 2**31] to [0, 1 - 2**-24], the largest float32 below 1.
_UNIT = (1 - 2.0**-24) * 2.0**-31


class SamplingTensors(NamedTuple):
    """Parameters of n rows, each a tensor [n] on the device but for the last two.

    Attributes:
        temperature: float32; 0 takes the likeliest token, the lowest id of equals.
        top_k: int32; 0 is off.
        top_p: float32; 1 is off.
        min_p: float32; 0 is off.
        seed: int64.
        any_random: host: whether some row's temperature is not 0.
        any_filter: host: whether some row with a temperature has top_k, top_p or min_p on.
            What these two say of other rows never changes a row's token, only the cost.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    any_random: bool
    any_filter: bool


def sample(logits: Tensor, params: SamplingTensors, positions: Tensor) -> Tensor:
    """The next token of each row: temperature first, then top-k, top-p and min-p.

    Args:
        logits: float32 [n, vocab]; not changed.
        positions: int64 [n], the index in its sequence that the sampled token will have.

    Returns:
        int64 [n].
    """
    if not params.any_random:
        return logits.argmax(dim=-1)
    rows, vocab = logits.shape
    chunk = max(1, CHUNK_ELEMENTS // vocab)
    keys = stream_keys(params.seed, positions)
    sampled = torch.empty(rows, dtype=torch.int64, device=logits.device)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        temperature = params.temperature[part, None]
        scores = logits[part] / temperature.clamp_min(MIN_TEMPERATURE)
        if params.any_filter:
            kept = filter_mask(
                scores, params.top_k[part, None], params.top_p[part, None], params.min_p[part, None]
            )
            scores.masked_fill_(~kept, -torch.inf)
        scores -= exponential_noise(keys[part], vocab).log_()
        sampled[part] = torch.where(temperature > 0, scores, logits[part]).argmax(dim=-1)
    return sampled


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


def logprobs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-softmax of the raw logits: of the chosen token, then of the k likeliest.

    Args:
        logits: float32 [n, vocab].
        token_ids: int64 [n], the chosen ones.
        k: 0 up to the vocabulary's size.

    Returns:
        ids int64 [n, k + 1] and values float32 [n, k + 1].
    """
    values = logits.log_softmax(dim=-1)
    chosen = token_ids[:, None]
    top_values, top_ids = values.topk(k, dim=-1)
    ids = torch.cat((chosen, top_ids), dim=-1)
    return ids, torch.cat((values.gather(1, chosen), top_values), dim=-1)


# The random stream --------------------------------------------------------------------------------
#
# 64-bit arithmetic once a row, 32-bit arithmetic once a token, all of it modulo 2**64 and 2**32:
# torch's signed integers wrap around, and their right shifts are made logical by a mask.


def stream_keys(seed: Tensor, positions: Tensor) -> Tensor:
    """One key for each (seed, position), int64 [n]: the finalizer of splitmix64 over either."""
    return _mix64(_mix64(seed) + positions)


def exponential_noise(keys: Tensor, vocab: int, first: int = 0) -> Tensor:
    """Samples of Exp(1) for the tokens [first, first + vocab): float32 [n, vocab].

    Their precision is relative: 2**-24 down to values of 2**-7, and below that steps of 2**-31.
    The least is 2**-32, so their logarithm is finite.
    """
    bits = token_bits(keys, vocab, first).bitwise_and_(0x7FFFFFFF)
    return bits.to(torch.float32).add_(0.5).mul_(-_UNIT).log1p_().neg_()


def token_bits(keys: Tensor, vocab: int, first: int = 0) -> Tensor:
    """32 random bits for each row and each token of [first, first + vocab): int32 [n, vocab].

    The hash is `lowbias32` (Wellons, "Prospecting for Hash Functions", with the constants found
    later by TheIronBorn), to which the two halves of the row's key are given: one at its start,
    one in its middle, so that no two keys merely permute the same noise over the tokens.
    """
    low = (keys & 0xFFFFFFFF).to(torch.int32)[:, None]
    high = (keys >> 32).to(torch.int32)[:, None]
    tokens = torch.arange(first, first + vocab, dtype=torch.int32, device=keys.device)
    bits = tokens ^ low
    bits ^= _shifted32(bits, 16)
    bits *= _signed32(0x21F0AAAD)
    bits ^= high
    bits ^= _shifted32(bits, 15)
    bits *= _signed32(0xD35A2D97)
    bits ^= _shifted32(bits, 15)
    return bits


def _mix64(x: Tensor) -> Tensor:
    """One output of splitmix64 (Steele et al., 2014) from the state x, int64."""
    x = x + _signed64(0x9E3779B97F4A7C15)
    x = (x ^ _shifted64(x, 30)) * _signed64(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted64(x, 27)) * _signed64(0x94D049BB133111EB)
    return x ^ _shifted64(x, 31)


def _shifted32(x: Tensor, by: int) -> Tensor:
    return (x >> by).bitwise_and_((1 << (32 - by)) - 1)


def _shifted64(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed32(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


def _signed64(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
