"""Sampling where each rank has the logits of its shard of the vocabulary.

Every rank draws with the same stream, keyed by token id, and they exchange what decides, in shapes
that depend on nothing but the number of rows: a captured step cannot look at more. What the host
knows of the rows' parameters says which of two ways a step goes:

- Where few candidates decide every row, the ranks gather their shortlists of these, 512 bytes a row
  and rank, and each chooses from them by itself (`kernels.sampling.candidates`).
- A row with top-p or min-p alone, or with a larger top-k, may keep any number of tokens: it is
  wide. A step with such a row is spread over the ranks, each of which is sent all logits of its
  rows, draws them whole, and tells the others the tokens. So each logit moves once, where gathering
  them all on every rank would move it to each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.sampling.ops import SamplingOps
from nanovllm.kernels.sampling.reference import SamplingTensors
from nanovllm.services.gpu_worker.model.parallel import VocabShard


def sample(
    logits: Tensor,
    params: SamplingTensors,
    positions: Tensor,
    ids: VocabShard,
    wide: bool,
    ops: SamplingOps,
) -> Tensor:
    """As `reference.sample`, on every rank.

    Args:
        logits: [n, shard], this rank's.
        wide: whether there may be a wide row; the same on every rank.
        ops: what this device samples with.
    """
    if wide:
        return _by_rows(logits, params, positions, ids, ops)
    sent = ops.shortlist(logits, params, positions, ids.first)
    return ops.choose(ids.tp.all_gather(sent), params, positions)


def _by_rows(
    logits: Tensor, params: SamplingTensors, positions: Tensor, ids: VocabShard, ops: SamplingOps
) -> Tensor:
    """Each rank draws whole rows of its own."""
    rows, shard = logits.shape
    tp = ids.tp
    each = -(-rows // tp.size)
    padded = F.pad(logits, (0, 0, 0, each * tp.size - rows)).view(tp.size, each, shard)
    whole = tp.all_to_all(padded).transpose(0, 1).reshape(each, tp.size * shard)
    first = tp.rank * each
    own = torch.arange(first, first + each, device=logits.device).clamp_(max=rows - 1)
    drawn = SamplingTensors(*(values[own] for values in params))
    tokens = ops.sample(whole, drawn, positions[own])
    return tp.all_gather(tokens[None])[0, :rows]


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
