"""Triton functions that find the tokens of a row that top-k, top-p and min-p keep.

They work in the order (score descending, id ascending), of which the filters keep the first tokens.
Two forms of a row occur:

- Listed tokens: the row's groups in which tokens may be kept, read from the logits page by page.
  `tokens` is the tuple (logits, vocab, scale, listed, num_listed, num_groups).
- Candidates: few tokens in memory, in any order, all pairs of which are compared. They are stored
  as runs of RUN scores and RUN token ids; the next run is 2 * RUN further on. A candidate with the
  id LAST is unused.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nanovllm.kernels.sampling.random_stream_triton import LN_2, gumbel, token_bits

LOWEST = tl.constexpr(-3.4028234663852886e38)  # float32's
LAST = tl.constexpr(0x7FFFFFFF)  # an id after all others
LOG2_E = tl.constexpr(1.4426950408889634)
# `kth_lower_bound` stops once at most k + _SLACK of the groups' maxima reach the bound.
_SLACK = tl.constexpr(8)
_BISECTIONS = tl.constexpr(32)


@triton.jit
def kth_lower_bound(maxima, peak, k):
    """A score that at least k of the groups' maxima reach, and few more; LOWEST if fewer than k are
    finite."""
    finite = maxima > float("-inf")
    reaching = tl.sum(finite.to(tl.int32), 0)
    least = tl.min(tl.where(finite, maxima, peak), 0)
    lower = tl.where(reaching >= k, least, LOWEST)
    upper = tl.where(reaching >= k, peak, LOWEST)
    step = 0
    while (reaching > k + _SLACK) & (step < _BISECTIONS):
        middle = lower + (upper - lower) * 0.5
        count = tl.sum((maxima >= middle).to(tl.int32), 0)
        enough = count >= k
        lower = tl.where(enough, middle, lower)
        upper = tl.where(enough, upper, middle)
        reaching = tl.where(enough, count, reaching)
        step += 1
    return lower


@triton.jit
def best_of_chunks(best_ptr, best_ids_ptr, row, chunks, CHUNKS: tl.constexpr):
    """The highest value of the row's chunks, and its token; (inf, NOT_FINITE) if a chunk is."""
    parts = tl.arange(0, CHUNKS)
    present = parts < chunks
    values = tl.load(best_ptr + row * chunks + parts, mask=present, other=float("-inf"))
    ids = tl.load(best_ids_ptr + row * chunks + parts, mask=present, other=LAST)
    best = tl.max(values, 0)
    return best, tl.min(tl.where(values == best, ids, LAST), 0)


@triton.jit
def load_maxima(maxima_ptr, row, num_groups, GROUPS: tl.constexpr):
    """The highest score of each group of the row; -inf beyond."""
    groups = tl.arange(0, GROUPS)
    return tl.load(
        maxima_ptr + row.to(tl.int64) * num_groups + groups,
        mask=groups < num_groups,
        other=float("-inf"),
    )


@triton.jit
def list_tokens(logits, vocab, scale, maxima, floor, listed, num_groups, GROUPS: tl.constexpr):
    """Lists the groups, ascending, with a token that reaches the floor; returns `tokens`."""
    reach = (maxima >= floor) & (maxima > float("-inf"))
    index = tl.cumsum(reach.to(tl.int32), 0) - 1
    tl.store(listed + index, tl.arange(0, GROUPS), mask=reach)
    tl.debug_barrier()
    return logits, vocab, scale, listed, tl.sum(reach.to(tl.int32), 0), num_groups


@triton.jit
def load_page(tokens, start, PAGE: tl.constexpr, GROUP: tl.constexpr):
    """Scores and token ids [PAGE, GROUP] of the listed groups from `start` on; -inf beyond."""
    logits, vocab, scale, listed, num_listed, num_groups = tokens
    at = start + tl.arange(0, PAGE)
    present = at < num_listed
    # If all groups are listed, the list need not be read.
    to_read = tl.where(num_listed < num_groups, num_listed, 0)
    groups = tl.load(listed + at, mask=at < to_read, other=0)
    groups = tl.where(num_listed < num_groups, groups, at)
    ids = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = present[:, None] & (ids < vocab)
    scores = tl.load(logits + ids, mask=inside, other=float("-inf")).to(tl.float32) * scale
    return scores, ids


@triton.jit
def before(scores, ids, than_scores, than_ids):
    """Whether the first come before the second in the order (score descending, id ascending)."""
    return (scores > than_scores) | ((scores == than_scores) & (ids < than_ids))


@triton.jit
def rank_and_mass(tokens, score, token, peak, PAGE: tl.constexpr, GROUP: tl.constexpr):
    """How many listed tokens come before (score, token), and the sum of their weights
    exp(score - peak)."""
    counts = tl.zeros([PAGE], tl.int32)
    masses = tl.zeros([PAGE], tl.float32)
    num_listed = tokens[4]
    for start in range(0, num_listed, PAGE):
        scores, ids = load_page(tokens, start, PAGE, GROUP)
        ahead = before(scores, ids, score, token) & (scores > float("-inf"))
        counts += tl.sum(ahead.to(tl.int32), 1)
        masses += tl.sum(tl.where(ahead, tl.exp(scores - peak), 0.0), 1)
    return tl.sum(counts, 0), tl.sum(masses, 0)


@triton.jit
def kth_score(tokens, floor, peak, k, PAGE: tl.constexpr, GROUP: tl.constexpr):
    """The k-th highest score of the listed tokens, by bisection of its bits. At least k of them
    must reach the floor."""
    lower = ordered(floor).to(tl.int64)
    upper = ordered(peak).to(tl.int64) + 1
    while upper - lower > 1:
        middle = (lower + upper) >> 1
        reaching, _ = rank_and_mass(
            tokens, from_ordered(middle.to(tl.int32)), LAST, peak, PAGE, GROUP
        )
        enough = reaching >= k
        lower = tl.where(enough, middle, lower)
        upper = tl.where(enough, upper, middle)
    return from_ordered(lower.to(tl.int32))


@triton.jit
def gather(
    tokens,
    floor,
    ceiling,
    candidates,
    candidate_ids,
    gathered,
    room,
    GATHER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Appends the listed tokens with a score in [floor, ceiling] to the candidates, ids ascending.

    Returns how many candidates there are then; if more than `room`, any number above it.
    """
    num_listed = tokens[4]
    start = 0
    while (start < num_listed) & (gathered <= room):
        scores, ids = load_page(tokens, start, GATHER, GROUP)
        scores = tl.reshape(scores, [GATHER * GROUP])
        ids = tl.reshape(ids, [GATHER * GROUP])
        wanted = (scores >= floor) & (scores <= ceiling)
        at = gathered + tl.cumsum(wanted.to(tl.int32), 0) - 1
        fits = wanted & (at < room)
        tl.store(candidates + at, scores, mask=fits)
        tl.store(candidate_ids + at, ids, mask=fits)
        gathered += tl.sum(wanted.to(tl.int32), 0)
        start += GATHER
    return gathered


@triton.jit
def draw_before(tokens, cut, score, token, low, high, PAGE: tl.constexpr, GROUP: tl.constexpr):
    """The listed token with the highest score + noise of those that come before (score, token) and
    reach `cut`; LAST if there is none."""
    best = float("-inf")
    best_id = LAST
    num_listed = tokens[4]
    for start in range(0, num_listed, PAGE):
        scores, ids = load_page(tokens, start, PAGE, GROUP)
        eligible = before(scores, ids, score, token) & (scores >= cut)
        scores = tl.where(eligible, scores, float("-inf"))
        best, best_id = update_best(scores, 1.0, ids, best, best_id, True, low, high)
    return best_id


@triton.jit
def update_best(logits, scale, ids, best, best_id, noisy, low, high):
    """The best score, or if `noisy` the best score + noise, of these tokens and of those before,
    and its token.

    Most tokens cannot win, whatever the exact value of their noise -log(E): E = -log(1 - u) is at
    least u, so a token with u above exp(score - best) cannot. That saves two logarithms.
    """
    if noisy:
        # The limit of u, of 31 bits, with a margin for rounding.
        more = 31.001 - best * LOG2_E + tl.abs(best) * 1e-6
        room = tl.exp2(tl.fma(logits, tl.zeros_like(logits) + scale * LOG2_E, more))
        promising = tl.max(tl.max((token_bits(low, high, ids) < room).to(tl.int32), 1), 0) > 0
    else:
        promising = tl.max(tl.max(logits, 1), 0) * scale > best
    if promising:
        scores = logits * scale
        if noisy:
            scores = scores + gumbel(token_bits(low, high, ids))
        highest = tl.max(tl.max(scores, 1), 0)
        if highest > best:
            best = highest
            best_id = tl.min(tl.min(tl.where(scores == highest, ids, LAST), 1), 0)
    return best, best_id


@triton.jit
def ordered(x):
    """Maps float32 to int32, in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(bits):
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_candidates(scores_ptr, ids_ptr, at, count, RUN: tl.constexpr):
    """Score and token id of the candidates number `at`, of `count`."""
    index = at + at // RUN * RUN
    scores = tl.load(scores_ptr + index, mask=at < count, other=float("-inf"))
    return scores, tl.load(ids_ptr + index, mask=at < count, other=LAST)


@triton.jit
def rank_candidates(
    scores_ptr,
    ids_ptr,
    count,
    peak,
    COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Ranks at most COLUMNS candidates.

    Returns their scores and ids, how many candidates come before each, and the sum of the weights
    exp(score - peak) of these.
    """
    scores, ids = load_candidates(scores_ptr, ids_ptr, tl.arange(0, COLUMNS), count, RUN)
    ranks = tl.zeros([COLUMNS], tl.int32)
    likelier = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, count, PAIRS):
        others = first + tl.arange(0, PAIRS)
        other_scores, other_ids = load_candidates(scores_ptr, ids_ptr, others, count, RUN)
        ahead = before(other_scores[None, :], other_ids[None, :], scores[:, None], ids[:, None])
        weights = tl.exp(other_scores - peak)[None, :]
        ranks += tl.sum(ahead.to(tl.int32), 1)
        likelier += tl.sum(tl.where(ahead, weights, 0.0), 1)
    return scores, ids, ranks, likelier


@triton.jit
def draw_candidate(
    scores_ptr,
    ids_ptr,
    count,
    peak,
    top_k,
    top_p,
    min_p,
    low,
    high,
    COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The candidate with the highest score + noise of those that the filters keep; LAST without
    candidates. `peak` is their highest score."""
    scores, ids, ranks, likelier = rank_candidates(
        scores_ptr, ids_ptr, count, peak, COLUMNS, RUN, PAIRS
    )
    in_top_k = (ids < LAST) & (ranks < tl.where(top_k > 0, top_k, COLUMNS))
    total = tl.sum(tl.where(in_top_k, tl.exp(scores - peak), 0.0), 0)
    in_top_p = likelier < tl.where(top_p < 1, top_p * total, float("inf"))
    in_min_p = scores >= floor_of_min_p(peak, min_p)
    kept = in_top_k & ((in_top_p & in_min_p) | (ranks == 0))
    noisy = tl.where(kept, scores + gumbel(token_bits(low, high, ids)), float("-inf"))
    return tl.min(tl.where(kept & (noisy == tl.max(noisy, 0)), ids, LAST), 0)


@triton.jit
def floor_of_min_p(peak, min_p):
    """The lowest score that min-p keeps."""
    floor = peak + tl.log2(tl.where(min_p > 0, min_p, 1.0)) * LN_2
    return tl.where(min_p > 0, floor, LOWEST)
