"""Sampling in plain torch: a CPU runs it, and the kernels are tested against it.

`sample` needs whole logits. Where the vocabulary is spread over shards, few tokens of each shard
decide most rows:

- at temperature 0 the token with the best logit, and without filters the one with the best score +
  noise;
- with a top-k of at most SHORTLIST_SIZE the k likeliest. The top-k of all shards keeps tokens from
  among these only. Top-p, which is of the mass that top-k leaves, and min-p are decided on them.

So each shard makes a `shortlist` of fixed length, whatever its rows ask for, and
`sample_shortlists` draws from the shortlists of all shards the token that `sample` draws from the
whole logits. Rows with top-p or min-p alone, or with a larger top-k, may keep any number of tokens:
they need whole logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.sampling import SHORTLIST_SIZE
from nanovllm.kernels.sampling.random_stream import (
    exponential_noise,
    exponential_noise_of,
    stream_keys,
)

# Logits are divided by at least this temperature. Below it only the likeliest token has a chance,
# and 1 / t might overflow.
MIN_TEMPERATURE = 1e-6
# Rows are computed in chunks whose temporaries hold about this many elements.
CHUNK_ELEMENTS = 1 << 20
# The token id of an unused entry of a shortlist.
NO_TOKEN = 0x7FFFFFFF
# What a row has in place of a token if its logits are not finite: any is NaN or inf, or all -inf.
NOT_FINITE = -1


class SamplingTensors(NamedTuple):
    """The sampling parameters of n rows, each a tensor [n] on the device.

    Attributes:
        temperature: float32; 0 takes the likeliest token, of equally likely tokens the lowest id.
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


def sample(
    logits: Tensor, params: SamplingTensors, positions: Tensor, out: Tensor | None = None
) -> Tensor:
    """The next token of each row: temperature first, then top-k, top-p and min-p.

    Reads the parameters on the host, and does only what they ask for.

    Args:
        logits: [n, vocab] of any float dtype; not changed.
        positions: int64 [n], the index in its sequence that the sampled token will have. A row
            that no filter has an effect on may have a negative one: it gets any token, or none.
        out: int64 [n], where to write the tokens, if given.

    Returns:
        int64 [n]; NOT_FINITE where the row's logits are.
    """
    filtered = filters(params)
    keys = stream_keys(params.seed, positions)
    sampled = torch.empty_like(positions) if out is None else out
    if not filtered.any():
        best, where = noisy_best(logits, params.temperature, keys)
        return sampled.copy_(where.masked_fill_(~best.isfinite(), NOT_FINITE))
    rows, vocab = logits.shape
    for part in _parts(rows, vocab):
        temperature = params.temperature[part]
        kept = filter_mask(
            temper(logits[part], temperature),
            params.top_k[part, None],
            params.top_p[part, None],
            params.min_p[part, None],
        )
        left = logits[part].masked_fill(~kept, -torch.inf)
        best, where = noisy_best(left, temperature, keys[part])
        sampled[part] = where.masked_fill_(~best.isfinite(), NOT_FINITE)
    return sampled


def filters(params: SamplingTensors) -> Tensor:
    """Which rows have a filter that has an effect: bool [n]."""
    on = (params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0)
    return on & (params.temperature > 0)


def noisy_best(
    logits: Tensor, temperature: Tensor, keys: Tensor, first: int = 0
) -> tuple[Tensor, Tensor]:
    """The highest score + noise of each row, or at temperature 0 its highest logit.

    Args:
        logits: [n, columns].
        temperature: [n].
        keys: int64 [n], see `stream_keys`.
        first: the token id of the first column.

    Returns:
        float32 [n], and its column int64 [n].
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
    """The scores float32 [n, vocab]: logits over temperatures [n]."""
    return logits.float() * temperature[:, None].clamp_min(MIN_TEMPERATURE).reciprocal()


def _parts(rows: int, columns: int) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // columns)
    return (slice(start, start + size) for start in range(0, rows, size))


def filter_mask(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which tokens each row may draw; at least one.

    Top-k keeps the k likeliest tokens. Top-p keeps the fewest likeliest of these whose renormalized
    probabilities reach p together. Min-p keeps the tokens that are at least min_p times as likely
    as the likeliest. Of equally likely tokens the lowest ids are kept.

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
    likelier = F.pad(probabilities.cumsum(dim=-1)[:, :-1], (1, 0))  # mass of likelier tokens
    in_top_p = (top_p >= 1) | (likelier < top_p)
    in_min_p = (min_p == 0) | (probabilities >= min_p * probabilities[:, :1])
    kept = (in_top_k & in_top_p & in_min_p) | (ranks == 0)
    return torch.empty_like(kept).scatter_(1, order, kept)


def shortlist(logits: Tensor, params: SamplingTensors, positions: Tensor, first: int) -> Tensor:
    """A shard's shortlists.

    Args:
        logits: [n, shard] of any float dtype, of the tokens from `first` on.
        positions: int64 [n], as for `sample`.

    Returns:
        int32 [n, 2 * SHORTLIST_SIZE]: the bits of float32 scores, then token ids. A row with a
        top-k has its likeliest tokens, in the order (score descending, id ascending). Any other row
        has its best token, with its score + noise, or at temperature 0 its logit. Unused entries
        are (-inf, NO_TOKEN). The first entry of a row with NaN or inf is (inf, NOT_FINITE).
    """
    rows, shard = logits.shape
    scores = torch.full((rows, SHORTLIST_SIZE), -torch.inf, device=logits.device)
    ids = torch.full((rows, SHORTLIST_SIZE), NO_TOKEN, dtype=torch.int32, device=logits.device)
    filtered = _has_small_top_k(params)
    if not filtered.all():
        part = _indices(~filtered)
        keys = stream_keys(params.seed[part], positions[part])
        best, columns = noisy_best(logits[part], params.temperature[part], keys, first)
        scores[part, 0], ids[part, 0] = best, (columns + first).int()
    if filtered.any():
        part, count = _indices(filtered), min(SHORTLIST_SIZE, shard)
        likeliest, columns = _likeliest(temper(logits[part], params.temperature[part]), count)
        in_top_k = torch.arange(count, device=logits.device) < params.top_k[part, None]
        left = ~in_top_k | (likeliest == -torch.inf)
        scores[part, :count] = likeliest.masked_fill_(left, -torch.inf)
        ids[part, :count] = (columns + first).int().masked_fill_(left, NO_TOKEN)
    bad = ~(scores[:, 0] < torch.inf)
    scores[:, 0].masked_fill_(bad, torch.inf)
    ids[:, 0].masked_fill_(bad, NOT_FINITE)
    return torch.cat((scores.view(torch.int32), ids), dim=-1)


def sample_shortlists(
    shortlists: Tensor, params: SamplingTensors, positions: Tensor, out: Tensor | None = None
) -> Tensor:
    """The next token of each row, as `sample` draws it from the whole logits.

    Args:
        shortlists: int32 [n, shards * 2 * SHORTLIST_SIZE], of all shards side by side.
        positions, out: as for `sample`.

    Returns:
        int64 [n]; NOT_FINITE where the row's logits are.
    """
    rows = len(shortlists)
    shards = shortlists.shape[1] // (2 * SHORTLIST_SIZE)
    entries = shortlists.view(rows, shards, 2, SHORTLIST_SIZE)
    # In the order of ids, since of equal scores the lowest id comes first.
    ids, order = entries[:, :, 1].flatten(1).sort(dim=-1)
    scores = entries[:, :, 0].flatten(1).view(torch.float32).gather(1, order)
    filtered = _has_small_top_k(params)
    if filtered.any():
        top_k, top_p, min_p = (values[:, None] for values in params[1:4])
        kept = filter_mask(scores, top_k, top_p, min_p)
        noise = exponential_noise_of(stream_keys(params.seed, positions), ids)
        drawn = (scores - noise.log_()).masked_fill_(~kept, -torch.inf)
        scores = torch.where(filtered[:, None], drawn, scores)
    best, where = scores.max(dim=-1, keepdim=True)
    tokens = ids.gather(1, where).long()
    tokens = tokens.masked_fill_((ids[:, :1] < 0) | (best == -torch.inf), NOT_FINITE)[:, 0]
    return tokens if out is None else out.copy_(tokens)


def _has_small_top_k(params: SamplingTensors) -> Tensor:
    return (params.temperature > 0) & (params.top_k > 0) & (params.top_k <= SHORTLIST_SIZE)


def _indices(rows: Tensor) -> Tensor | slice:
    """The indices of the true rows; a slice, which copies nothing, if all are true."""
    return slice(None) if rows.all() else rows.nonzero().flatten()


def _likeliest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest scores of each row and their columns, in the order (score descending, column
    ascending)."""
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=-1)
    if k < scores.shape[1]:
        # Of the scores equal to the k-th, topk may have taken any.
        tied = (values[:, k - 1] == values[:, k]) & (values[:, k] > -torch.inf)
        for row in tied.nonzero().flatten().tolist():
            equal = (scores[row] == values[row, k]).nonzero().flatten()
            above = int((values[row] > values[row, k]).sum())
            columns[row, above:k] = equal[: k - above]
    columns = columns[:, :k].sort(dim=-1).values
    values, order = scores.gather(1, columns).sort(dim=-1, descending=True, stable=True)
    return values, columns.gather(1, order)


class Draw(Protocol):
    """Draws from logits, or from shortlists."""

    def __call__(
        self,
        given: Tensor,
        params: SamplingTensors,
        positions: Tensor,
        out: Tensor | None = None,
        /,
    ) -> Tensor: ...


class SamplingOps(NamedTuple):
    """`sample`, `shortlist` and `sample_shortlists` of a device."""

    sample: Draw
    shortlist: Callable[[Tensor, SamplingTensors, Tensor, int], Tensor]
    sample_shortlists: Draw


def choose_sampling_ops(device: torch.device) -> SamplingOps:
    """The fastest operations that run on `device`; on CUDA they read nothing back to the host."""
    if device.type != "cuda":
        return SamplingOps(sample, shortlist, sample_shortlists)
    # Imported where they are chosen: a CPU may have no Triton, and importing it is slow.
    from nanovllm.kernels.sampling import fused, fused_shortlists

    return SamplingOps(fused.sample, fused_shortlists.shortlist, fused_shortlists.sample_shortlists)
