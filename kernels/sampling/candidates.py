"""Sampling from shards of the vocabulary, by their candidates: in plain torch.

Most rows are decided by few tokens of each shard:

- at temperature 0 by its best logit, and without filters by its best score + noise;
- with a top-k of at most CANDIDATES by its k likeliest: what the top-k of all shards keeps is among
  these, and top-p, which is of the mass that top-k leaves, and min-p are decided there.

So each shard makes a shortlist of fixed length, whatever its rows ask for, and who has those of all
shards chooses what `reference.sample` draws from the whole logits. Top-p or min-p alone may keep
any number of tokens: rows with these are not for here, and nor are those with a larger top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels.sampling import CANDIDATES
from nanovllm.kernels.sampling.reference import (
    SamplingTensors,
    filter_mask,
    noisy_best,
    temper,
)
from nanovllm.kernels.sampling.stream import exponential_noise_of, stream_keys

LAST = 0x7FFFFFFF  # the id of an entry that is none


def shortlist(logits: Tensor, params: SamplingTensors, positions: Tensor, first: int) -> Tensor:
    """What a shard sends.

    Args:
        logits: [n, shard] of any float dtype; those of the tokens from `first` on.
        positions: int64 [n], as for `reference.sample`.

    Returns:
        int32 [n, 2 * CANDIDATES]: float32 scores, by their bits, then token ids. A row with a top-k
        has its likeliest tokens, of equally likely ones the lowest ids, in that order; any other
        row its best logit, or score with noise. The rest are (-inf, LAST).
    """
    rows, shard = logits.shape
    scores = torch.full((rows, CANDIDATES), -torch.inf, device=logits.device)
    ids = torch.full((rows, CANDIDATES), LAST, dtype=torch.int32, device=logits.device)
    filtered = _filtered(params)
    if not filtered.all():
        part = _indices(~filtered)
        keys = stream_keys(params.seed[part], positions[part])
        best, columns = noisy_best(logits[part], params.temperature[part], keys, first)
        scores[part, 0], ids[part, 0] = best, (columns + first).int()
    if filtered.any():
        part, count = _indices(filtered), min(CANDIDATES, shard)
        likeliest, columns = _likeliest(temper(logits[part], params.temperature[part]), count)
        in_top_k = torch.arange(count, device=logits.device) < params.top_k[part, None]
        left = ~in_top_k | (likeliest == -torch.inf)
        scores[part, :count] = likeliest.masked_fill_(left, -torch.inf)
        ids[part, :count] = (columns + first).int().masked_fill_(left, LAST)
    return torch.cat((scores.view(torch.int32), ids), dim=-1)


def choose(shortlists: Tensor, params: SamplingTensors, positions: Tensor) -> Tensor:
    """The next token of each row, as `reference.sample` draws it from the whole logits.

    Args:
        shortlists: int32 [n, shards * 2 * CANDIDATES], those of all shards side by side.

    Returns:
        int64 [n].
    """
    rows = len(shortlists)
    shards = shortlists.shape[1] // (2 * CANDIDATES)
    entries = shortlists.view(rows, shards, 2, CANDIDATES)
    # Of equal ones, the lowest id is to come first.
    ids, order = entries[:, :, 1].flatten(1).sort(dim=-1)
    scores = entries[:, :, 0].flatten(1).view(torch.float32).gather(1, order)
    filtered = _filtered(params)
    if filtered.any():
        top_k, top_p, min_p = (values[:, None] for values in params[1:4])
        kept = filter_mask(scores, top_k, top_p, min_p)
        noise = exponential_noise_of(stream_keys(params.seed, positions), ids)
        drawn = (scores - noise.log_()).masked_fill_(~kept, -torch.inf)
        scores = torch.where(filtered[:, None], drawn, scores)
    tokens = ids.gather(1, scores.argmax(dim=-1, keepdim=True))[:, 0].long()
    return tokens.masked_fill_(tokens == LAST, 0)  # all logits are -inf


def _filtered(params: SamplingTensors) -> Tensor:
    return (params.temperature > 0) & (params.top_k > 0) & (params.top_k <= CANDIDATES)


def _indices(rows: Tensor) -> Tensor | slice:
    """Of those that are true; where all are, without a copy of what is indexed."""
    return slice(None) if rows.all() else rows.nonzero().flatten()


def _likeliest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest scores of each row in descending order, and their columns, of equal ones the
    lowest."""
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=-1)
    if k < scores.shape[1]:
        # Of those equal to the last, it may have taken any.
        tied = (values[:, k - 1] == values[:, k]) & (values[:, k] > -torch.inf)
        for row in tied.nonzero().flatten().tolist():
            equal = (scores[row] == values[row, k]).nonzero().flatten()
            above = int((values[row] > values[row, k]).sum())
            columns[row, above:k] = equal[: k - above]
    columns = columns[:, :k].sort(dim=-1).values
    values, order = scores.gather(1, columns).sort(dim=-1, descending=True, stable=True)
    return values, columns.gather(1, order)
