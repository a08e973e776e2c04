"""Sampling where each rank has the logits of its shard of the vocabulary.

Every rank draws with the same stream, keyed by token id, and they exchange what decides:

- Of a row without filters, the best score + noise, in one maximum over the ranks.
- Of a filtered row, the likeliest CANDIDATES of each rank, in one gathering. Below the lowest that
  some rank sent there may be others; above it, the order of all tokens is known. If what the
  filters keep ends there, each rank draws from it by itself.
- Rows whose filters keep more are spread over the ranks, each of which is sent all logits of its
  rows and draws for the others too. So each logit moves once, where gathering them all on every
  rank would move it to each.

FEW logits are gathered as they are. A GPU samples whole rows faster than it exchanges twice, and a
captured step cannot look at which rows need what: there, all rows are spread.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.sampling import reference
from nanovllm.kernels.sampling.reference import SamplingTensors, filters, noisy_best, temper
from nanovllm.kernels.sampling.stream import exponential_noise_of, stream_keys
from nanovllm.services.gpu_worker.model.parallel import VocabShard

CANDIDATES = 64
# 64 KiB in float32: gathering them takes no longer than to find out what else to send.
FEW = 1 << 14
_LAST_ID = 0x7FFFFFFF


def sample(logits: Tensor, params: SamplingTensors, positions: Tensor, ids: VocabShard) -> Tensor:
    """As `reference.sample`, on every rank.

    Args:
        logits: [n, shard], this rank's.
    """
    if logits.numel() <= FEW:
        return reference.sample(ids.tp.all_gather(logits), params, positions)
    keys = stream_keys(params.seed, positions)
    filtered = filters(params)
    if not filtered.any():
        best, columns = noisy_best(logits, params.temperature, keys, ids.first)
        return _winner(best, columns + ids.first, ids)
    sampled = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if len(rows := (~filtered).nonzero().flatten()):
        best, columns = noisy_best(logits[rows], params.temperature[rows], keys[rows], ids.first)
        sampled[rows] = _winner(best, columns + ids.first, ids)
    rows = filtered.nonzero().flatten()
    part = _of_rows(params, rows)
    sampled[rows], known = _from_candidates(logits[rows], part, keys[rows], ids)
    if len(rows := rows[~known]):
        part = _of_rows(params, rows)
        sampled[rows] = sample_by_rows(logits[rows], part, positions[rows], ids, reference.sample)
    return sampled


def sample_by_rows(
    logits: Tensor, params: SamplingTensors, positions: Tensor, ids: VocabShard, draw: Draw
) -> Tensor:
    """The same, each rank drawing whole rows of its own. Looks at nothing on the host.

    Args:
        draw: what draws from whole rows, like `reference.sample`.
    """
    rows, shard = logits.shape
    tp = ids.tp
    each = -(-rows // tp.size)
    padded = F.pad(logits, (0, 0, 0, each * tp.size - rows)).view(tp.size, each, shard)
    whole = tp.all_to_all(padded).transpose(0, 1).reshape(each, tp.size * shard)
    first = tp.rank * each
    own = torch.arange(first, first + each, device=logits.device).clamp_(max=rows - 1)
    tokens = draw(whole, _of_rows(params, own), positions[own])
    return tp.all_gather(tokens[None])[0, :rows]


Draw = Callable[[Tensor, SamplingTensors, Tensor], Tensor]


def _of_rows(params: SamplingTensors, rows: Tensor) -> SamplingTensors:
    return SamplingTensors(*(values[rows] for values in params))


def _from_candidates(
    logits: Tensor, params: SamplingTensors, keys: Tensor, ids: VocabShard
) -> tuple[Tensor, Tensor]:
    """Tokens int64 [n], and of which rows the candidates were enough to know them, bool [n].

    Args:
        keys: int64 [n], see `stream_keys`.
    """
    scores = temper(logits, params.temperature)
    rows, shard = scores.shape
    count = min(CANDIDATES, shard)
    sent_scores, columns = scores.topk(count, dim=-1)
    horizon = sent_scores[:, -1:] if count < shard else torch.full_like(scores[:, :1], -torch.inf)
    sent_ids = (columns + ids.first).int().view(torch.float32)
    mass = scores.logsumexp(dim=-1, keepdim=True)
    gathered = ids.tp.all_gather(torch.cat((sent_scores, sent_ids, horizon, mass), dim=-1))
    gathered = gathered.view(rows, ids.tp.size, 2 * count + 2)
    horizon = gathered[:, :, -2].amax(dim=-1, keepdim=True)
    mass = gathered[:, :, -1].logsumexp(dim=-1, keepdim=True)

    tokens = gathered[:, :, count:-2].reshape(rows, -1).view(torch.int32)
    tokens, order = tokens.sort(dim=-1)
    candidates = gathered[:, :, :count].reshape(rows, -1).gather(1, order)
    candidates, order = candidates.sort(dim=-1, descending=True, stable=True)
    tokens = tokens.gather(1, order)

    top_k, top_p, min_p = (values[:, None] for values in params[1:4])
    ranks = torch.arange(candidates.shape[1], device=scores.device)
    ordered = candidates > horizon  # the others may have unknown ones before them
    num_ordered = ordered.sum(dim=-1, keepdim=True)
    weights = (candidates - candidates[:, :1]).exp()
    in_top_k = ordered & ((top_k == 0) | (ranks < top_k))
    total = torch.where(
        top_k > 0,
        (weights * in_top_k).sum(dim=-1, keepdim=True),
        (mass - candidates[:, :1]).exp(),
    )
    likelier = weights.cumsum(dim=-1) - weights
    in_top_p = (top_p >= 1) | (likelier < top_p * total)
    kept = (in_top_k & in_top_p & (weights >= min_p)) | (ranks == 0)
    ends = kept.sum(dim=-1, keepdim=True) < num_ordered
    known = (
        (horizon == -torch.inf)
        | ((top_k > 0) & (top_k <= num_ordered))
        | (((top_k == 0) | (top_p >= 1)) & ends)
    )
    noisy = candidates - exponential_noise_of(keys, tokens).log_()
    merits = _merit(noisy, tokens).masked_fill_(~kept, torch.iinfo(torch.int64).min)
    return _token(merits.amax(dim=-1)), known[:, 0]


def _ordered(x: Tensor) -> Tensor:
    """An int64 of 32 bits for each float32, in the same order."""
    bits = (x + 0.0).view(torch.int32)  # with one zero only
    return torch.where(bits < 0, bits ^ _LAST_ID, bits).long()


def _merit(scores: Tensor, tokens: Tensor) -> Tensor:
    """An int64 that is higher for a higher score, and for a lower id of equal ones."""
    return (_ordered(scores) << 32) + (_LAST_ID - tokens)


def _token(merits: Tensor) -> Tensor:
    return _LAST_ID - (merits & _LAST_ID)


def _winner(best: Tensor, tokens: Tensor, ids: VocabShard) -> Tensor:
    """The token with the best score of all ranks', int64 [n]."""
    return _token(ids.tp.all_reduce_max(_merit(best, tokens)))


def logprobs(logits: Tensor, token_ids: Tensor, k: int, ids: VocabShard) -> tuple[Tensor, Tensor]:
    """See `sampling.logprobs`; logits [n, shard] are this rank's."""
    rows, shard = logits.shape
    logits = logits.float()
    count = min(k, shard)
    values, columns = logits.topk(count, dim=-1)
    chosen = token_ids[:, None] - ids.first
    elsewhere = (chosen < 0) | (chosen >= shard)
    own = logits.gather(1, chosen.masked_fill(elsewhere, 0)).masked_fill_(elsewhere, -torch.inf)
    sent_ids = (columns + ids.first).int().view(torch.float32)
    sent = torch.cat((values, sent_ids, own, logits.logsumexp(dim=-1, keepdim=True)), dim=-1)
    gathered = ids.tp.all_gather(sent).view(rows, ids.tp.size, 2 * count + 2)
    values, order = gathered[:, :, :count].reshape(rows, -1).topk(k, dim=-1)
    tokens = gathered[:, :, count:-2].reshape(rows, -1).view(torch.int32).gather(1, order)
    own = gathered[:, :, -2].amax(dim=-1, keepdim=True)
    total = gathered[:, :, -1].logsumexp(dim=-1, keepdim=True)
    return (
        torch.cat((token_ids[:, None], tokens.long()), dim=-1),
        torch.cat((own, values), dim=-1) - total,
    )
