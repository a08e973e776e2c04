"""What a kernel does with a row's few candidates: it compares all pairs of them.

They are read from memory, in any order, by runs of RUN scores and as many token ids: the next run
is 2 * RUN further on. A candidate with the id LAST is none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nanovllm.kernels.sampling.device_stream import LN_2, gumbel, token_bits
from nanovllm.kernels.sampling.order import LAST, LOWEST, before


@triton.jit
def candidate(scores_ptr, ids_ptr, at, count, RUN: tl.constexpr):
    """Score and token id of the candidates `at`, of which there are `count`."""
    place = at + at // RUN * RUN
    scores = tl.load(scores_ptr + place, mask=at < count, other=float("-inf"))
    return scores, tl.load(ids_ptr + place, mask=at < count, other=LAST)


@triton.jit
def ranked(
    scores_ptr,
    ids_ptr,
    count,
    most,
    COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Of the candidates [COLUMNS], at most so many: scores and ids, how many come before each in
    the order (score descending, id ascending), and the sum of those' weights, relative to that of
    the score `most`."""
    scores, ids = candidate(scores_ptr, ids_ptr, tl.arange(0, COLUMNS), count, RUN)
    ranks = tl.zeros([COLUMNS], tl.int32)
    likelier = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, count, PAIRS):
        others = first + tl.arange(0, PAIRS)
        other_scores, other_ids = candidate(scores_ptr, ids_ptr, others, count, RUN)
        ahead = before(other_scores[None, :], other_ids[None, :], scores[:, None], ids[:, None])
        weights = tl.exp(other_scores - most)[None, :]
        ranks += tl.sum(ahead.to(tl.int32), 1)
        likelier += tl.sum(tl.where(ahead, weights, 0.0), 1)
    return scores, ids, ranks, likelier


@triton.jit
def draw_among(
    scores_ptr,
    ids_ptr,
    count,
    most,
    top_k,
    top_p,
    min_p,
    low,
    high,
    COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The one with the highest score + noise of the candidates that the filters keep; LAST if they
    keep none, as without candidates. The likeliest has the score `most`."""
    scores, ids, ranks, likelier = ranked(scores_ptr, ids_ptr, count, most, COLUMNS, RUN, PAIRS)
    in_top_k = (ids < LAST) & (ranks < tl.where(top_k > 0, top_k, COLUMNS))
    total = tl.sum(tl.where(in_top_k, tl.exp(scores - most), 0.0), 0)
    in_top_p = likelier < tl.where(top_p < 1, top_p * total, float("inf"))
    in_min_p = scores >= floor_of_min_p(most, min_p)
    kept = in_top_k & ((in_top_p & in_min_p) | (ranks == 0))
    noisy = tl.where(kept, scores + gumbel(token_bits(low, high, ids)), float("-inf"))
    return tl.min(tl.where(kept & (noisy == tl.max(noisy, 0)), ids, LAST), 0)


@triton.jit
def floor_of_min_p(most, min_p):
    """The least score that min-p keeps."""
    floor = most + tl.log2(tl.where(min_p > 0, min_p, 1.0)) * LN_2
    return tl.where(min_p > 0, floor, LOWEST)
