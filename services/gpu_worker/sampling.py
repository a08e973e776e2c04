"""From logits to token ids and log-probabilities, where each rank has its shard of the vocabulary.

All ranks draw from one random stream, keyed by token id, and exchange what decides, so that every
rank ends with the same tokens:

- Few tokens of each shard decide most rows: rows at temperature 0, without filters, or with a top-k
  of at most SHORTLIST_SIZE. Each rank makes a shortlist of these tokens, 512 bytes a row, and draws
  from the shortlists of all ranks (`kernels.sampling.reference`). The exchange has the same shape
  whatever the rows ask for, so CUDA graphs capture it.
- A row with top-p or min-p alone, or with a larger top-k, may keep any number of tokens: it needs
  whole logits. The ranks divide these rows among them, and the other ranks send their shards of a
  row to the rank that draws it. So each logit moves once; an all-gather would move it to all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels.sampling.reference import SamplingTensors, choose_sampling_ops
from nanovllm.services.gpu_worker.model.parallel import VocabShard


def sample(
    logits: Tensor,
    params: SamplingTensors,
    positions: Tensor,
    shard: VocabShard,
    out: Tensor | None = None,
) -> Tensor:
    """The next token of each row, as `reference.sample` says; of a row that needs whole logits any
    token, if there is more than one rank.

    Args:
        logits: [n, shard], this rank's.
        positions: int64 [n], the index in its sequence that the sampled token will have.
        out: int64 [n], where to write the tokens, if given.

    Returns:
        int64 [n], the same on every rank.
    """
    ops = choose_sampling_ops(logits.device)
    if shard.tp.size == 1:
        return ops.sample(logits, params, positions, out)
    shortlists = shard.tp.all_gather(ops.shortlist(logits, params, positions, shard.first))
    return ops.sample_shortlists(shortlists, params, positions, out)


def sample_whole(
    logits: Tensor, params: SamplingTensors, positions: Tensor, shard: VocabShard
) -> Tensor:
    """The next token of each row, from whole logits. Rank r draws the k rows from r * k on.

    Args:
        logits: [ranks * k, shard], this rank's.
        params: of the k rows that this rank draws.
        positions: int64 [k], as for `sample`, of the rows that this rank draws.

    Returns:
        int64 [ranks * k], the same on every rank.
    """
    tp = shard.tp
    shards = tp.all_to_all(logits.view(tp.size, -1, logits.shape[1]))
    whole = shards.transpose(0, 1).flatten(1)
    tokens = choose_sampling_ops(logits.device).sample(whole, params, positions)
    return tp.all_gather(tokens[None])[0]


def logprobs(logits: Tensor, token_ids: Tensor, k: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Log-softmax of the raw logits: of the chosen token, then of the k likeliest.

    Args:
        logits: [n, shard] of any float dtype, this rank's.
        token_ids: int64 [n], the chosen ones.
        k: 0 up to the vocabulary's size.

    Returns:
        ids int64 [n, k + 1] and values float32 [n, k + 1], the same on every rank.
    """
    rows, columns = logits.shape
    logits = logits.float()
    count = min(k, columns)
    values, likeliest = logits.topk(count, dim=-1)
    chosen = token_ids[:, None] - shard.first
    elsewhere = (chosen < 0) | (chosen >= columns)
    own = logits.gather(1, chosen.masked_fill(elsewhere, 0)).masked_fill_(elsewhere, -torch.inf)
    sent_ids = (likeliest + shard.first).int().view(torch.float32)
    sent = torch.cat((values, sent_ids, own, logits.logsumexp(dim=-1, keepdim=True)), dim=-1)
    gathered = shard.tp.all_gather(sent).view(rows, shard.tp.size, 2 * count + 2)
    values, order = gathered[:, :, :count].reshape(rows, -1).topk(k, dim=-1)
    tokens = gathered[:, :, count:-2].reshape(rows, -1).view(torch.int32).gather(1, order)
    own = gathered[:, :, -2].amax(dim=-1, keepdim=True)
    total = gathered[:, :, -1].logsumexp(dim=-1, keepdim=True)
    return (
        torch.cat((token_ids[:, None], tokens.long()), dim=-1),
        torch.cat((own, values), dim=-1) - total,
    )
