"""Sampling in two kernels, for any mix of greedy, random and filtered rows.

`_scan` reads the logits once, spread over (row, chunk of the vocabulary). Of a row without filters
it draws the chunk's candidate: the highest logit, or the highest score + noise. Of a filtered row
it also notes the maximum of each group of tokens.

`_choose`, a program for each row, joins the chunks; that is the token of a row without filters.
The tokens that filters keep are the first ones in the order (score descending, id ascending), and
the groups' maxima bound from below where they end: with top-k, at the k-th highest maximum, since
so many tokens are at least as high; with min-p, at a fixed distance from the highest. So what is
kept is in the few groups that reach that bound. If no more than CANDIDATES of their tokens do,
these are gathered, and the filters' definition is applied to all pairs of them. Else, as with
top-p alone, the token is found by rejection: draw one, and count the tokens and sum the weights
that stand before it; if it is not kept, then nothing after it is, and the next one is drawn among
those before. For top-p after top-k, the k-th highest score is found first, by bisection of its
bits.

All of it is exact but for the rounding of sums, so that of the tokens at the very edge of top-p or
min-p (within about 1e-6) others may be kept than `reference.sample` keeps. What a row draws depends
neither on other rows nor on their number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.sampling.reference import MIN_TEMPERATURE, SamplingTensors
from nanovllm.kernels.sampling.stream import UNIT


class Tuning(NamedTuple):
    """How the work is cut up; all but `programs` are powers of two.

    Attributes:
        group: tokens with a common maximum.
        tile: groups that a program of `_scan` takes at a time.
        programs: of `_scan`, into which a step is cut, if there is so much work.
        page: groups that `_choose` takes at a time where it reads many, and
        gather: where it gathers candidates.
        candidates: as many are compared in pairs,
        pairs: with so many at a time.
    """

    group: int = 64
    tile: int = 32
    programs: int = 1024
    page: int = 128
    gather: int = 32
    candidates: int = 256
    pairs: int = 32
    scan_warps: int = 4
    choose_warps: int = 16


DEFAULT_TUNING = Tuning()


def sample(
    logits: Tensor, params: SamplingTensors, positions: Tensor, tuning: Tuning = DEFAULT_TUNING
) -> Tensor:
    """As `reference.sample`, without a look at anything on the host.

    Args:
        logits: float32, bfloat16 or float16 [n, vocab]; each row contiguous.
        positions: int64 [n].

    Returns:
        int64 [n].
    """
    rows, vocab = logits.shape
    sampled = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return sampled
    tiles = triton.cdiv(vocab, tuning.tile * tuning.group)
    tiles_each = triton.cdiv(tiles, max(1, min(tiles, tuning.programs // rows)))
    chunks = triton.cdiv(tiles, tiles_each)
    groups = triton.cdiv(vocab, tuning.group)

    def scratch(columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=logits.device)

    best, best_ids = scratch(chunks, torch.float32), scratch(chunks, torch.int32)
    maxima = scratch(groups, torch.float32)
    _scan[(rows, chunks)](
        logits,
        logits.stride(0),
        vocab,
        *params,
        positions,
        best,
        best_ids,
        maxima,
        tiles_each,
        TILE=tuning.tile,
        GROUP=tuning.group,
        num_warps=tuning.scan_warps,
        enable_fp_fusion=False,
    )
    _choose[(rows,)](
        logits,
        logits.stride(0),
        vocab,
        *params,
        positions,
        best,
        best_ids,
        maxima,
        scratch(groups, torch.int32),
        scratch(tuning.candidates, torch.float32),
        scratch(tuning.candidates, torch.int32),
        sampled,
        chunks,
        CHUNKS=triton.next_power_of_2(tiles),
        GROUPS=triton.next_power_of_2(groups),
        GROUP=tuning.group,
        PAGE=tuning.page,
        GATHER=tuning.gather,
        CANDIDATES=tuning.candidates,
        PAIRS=tuning.pairs,
        num_warps=tuning.choose_warps,
        enable_fp_fusion=False,
    )
    return sampled


_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
_UNIT = tl.constexpr(UNIT)
_LN_2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # float32's
_LAST = tl.constexpr(0x7FFFFFFF)  # an id after all others
# The bound by groups' maxima is good enough once no more than so many reach it beyond k.
_SLACK = tl.constexpr(8)
_BISECTIONS = tl.constexpr(32)


@triton.jit(do_not_specialize=["tiles_each"])
def _scan(
    logits_ptr,  # [n, vocab]
    stride,
    vocab,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    positions_ptr,
    best_ptr,  # float32 [n, chunks]: the highest logit, or score with noise
    best_ids_ptr,  # int32 [n, chunks]: its token
    maxima_ptr,  # float32 [n, groups]: highest score of each; of filtered rows alone
    tiles_each,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    top_k = tl.where(top_k < vocab, top_k, 0)
    random = temperature > 0
    scale = tl.where(random, _scale(temperature), 1.0)
    bounded = (top_k > 0) | (min_p > 0)
    filtered = random & (bounded | (top_p < 1))
    noisy = random & (bounded == 0)
    low, high = _row_key(tl.load(seed_ptr + row), tl.load(positions_ptr + row))

    tile_groups = tl.arange(0, TILE)
    within = tile_groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    logits = logits_ptr + row.to(tl.int64) * stride
    num_groups = tl.cdiv(vocab, GROUP)
    maxima = maxima_ptr + row.to(tl.int64) * num_groups
    first_tile = chunk * tiles_each
    best = float("-inf")
    best_id = first_tile * (TILE * GROUP)
    for tile in range(first_tile, first_tile + tiles_each):
        ids = tile * (TILE * GROUP) + within
        values = tl.load(logits + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        if filtered:
            groups = tile * TILE + tile_groups
            tl.store(maxima + groups, tl.max(values, 1) * scale, mask=groups < num_groups)
        best, best_id = _contest(values, scale, ids, best, best_id, noisy, low, high)
    out = row * tl.num_programs(1) + chunk
    tl.store(best_ptr + out, best)
    tl.store(best_ids_ptr + out, best_id)


@triton.jit(do_not_specialize=["chunks"])
def _choose(
    logits_ptr,
    stride,
    vocab,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    positions_ptr,
    best_ptr,
    best_ids_ptr,
    maxima_ptr,
    listed_ptr,  # int32 [n, groups], scratch: groups in which tokens may be kept
    candidates_ptr,  # float32 [n, CANDIDATES], scratch: scores, and
    candidate_ids_ptr,  # int32 [n, CANDIDATES]: tokens
    sampled_ptr,  # int64 [n]
    chunks,
    CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    GATHER: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PAIRS: tl.constexpr,
):
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    top_k = tl.where(top_k < vocab, top_k, 0)
    bounded = (top_k > 0) | (min_p > 0)

    parts = tl.arange(0, CHUNKS)
    present = parts < chunks
    best = tl.load(best_ptr + row * chunks + parts, mask=present, other=float("-inf"))
    best_ids = tl.load(best_ids_ptr + row * chunks + parts, mask=present, other=_LAST)
    token = tl.min(tl.where(best == tl.max(best, 0), best_ids, _LAST), 0)

    if (temperature > 0) & (bounded | (top_p < 1)):
        scale = _scale(temperature)
        low, high = _row_key(tl.load(seed_ptr + row), tl.load(positions_ptr + row))
        logits = logits_ptr + row.to(tl.int64) * stride
        num_groups = tl.cdiv(vocab, GROUP)
        groups = tl.arange(0, GROUPS)
        maxima = tl.load(
            maxima_ptr + row.to(tl.int64) * num_groups + groups,
            mask=groups < num_groups,
            other=float("-inf"),
        )
        most = tl.max(maxima, 0)
        min_p_floor = most + tl.log2(tl.where(min_p > 0, min_p, 1.0)) * _LN_2
        min_p_floor = tl.where(min_p > 0, min_p_floor, _LOWEST)
        # No kept token is below the floor; and as top-p is of the mass that top-k leaves, all of
        # that is above it.
        floor = tl.where(top_p < 1, _LOWEST, min_p_floor)
        if top_k > 0:
            floor = tl.maximum(floor, _bound(maxima, most, top_k))
        reach = (maxima >= floor) & (maxima > float("-inf"))
        place = tl.cumsum(reach.to(tl.int32), 0) - 1
        num_listed = tl.sum(reach.to(tl.int32), 0)
        listed = listed_ptr + row.to(tl.int64) * num_groups
        tl.store(listed + place, groups, mask=reach)
        tl.debug_barrier()

        candidates = candidates_ptr + row * CANDIDATES
        candidate_ids = candidate_ids_ptr + row * CANDIDATES
        gathered = 0
        if bounded:
            start = 0
            while (start < num_listed) & (gathered <= CANDIDATES):
                scores, ids = _page(
                    logits, vocab, scale, listed, start, num_listed, num_groups, GATHER, GROUP
                )
                scores = tl.reshape(scores, [GATHER * GROUP])
                ids = tl.reshape(ids, [GATHER * GROUP])
                high_enough = scores >= floor
                at = gathered + tl.cumsum(high_enough.to(tl.int32), 0) - 1
                fits = high_enough & (at < CANDIDATES)
                tl.store(candidates + at, scores, mask=fits)
                tl.store(candidate_ids + at, ids, mask=fits)
                gathered += tl.sum(high_enough.to(tl.int32), 0)
                start += GATHER
            tl.debug_barrier()

        if bounded & (gathered <= CANDIDATES):
            lanes = tl.arange(0, CANDIDATES)
            inside = lanes < gathered
            scores = tl.load(candidates + lanes, mask=inside, other=float("-inf"))
            ids = tl.load(candidate_ids + lanes, mask=inside, other=_LAST)
            ranks = tl.zeros([CANDIDATES], tl.int32)
            likelier = tl.zeros([CANDIDATES], tl.float32)
            for first in range(0, gathered, PAIRS):
                others = first + tl.arange(0, PAIRS)
                other_scores = tl.load(
                    candidates + others, mask=others < gathered, other=float("-inf")
                )
                other_ids = tl.load(candidate_ids + others, mask=others < gathered, other=_LAST)
                ahead = _before(
                    other_scores[None, :], other_ids[None, :], scores[:, None], ids[:, None]
                )
                weights = tl.exp(other_scores - most)[None, :]
                ranks += tl.sum(ahead.to(tl.int32), 1)
                likelier += tl.sum(tl.where(ahead, weights, 0.0), 1)
            in_top_k = inside & (ranks < tl.where(top_k > 0, top_k, CANDIDATES))
            total = tl.sum(tl.where(in_top_k, tl.exp(scores - most), 0.0), 0)
            in_top_p = likelier < tl.where(top_p < 1, top_p * total, float("inf"))
            kept = in_top_k & ((in_top_p & (scores >= min_p_floor)) | (ranks == 0))
            noisy = tl.where(kept, scores + _gumbel(_bits(low, high, ids)), float("-inf"))
            found = tl.min(tl.where(kept & (noisy == tl.max(noisy, 0)), ids, _LAST), 0)
            token = tl.where(found < _LAST, found, token)
        else:
            held, total = _ahead(
                logits,
                vocab,
                scale,
                listed,
                num_listed,
                num_groups,
                floor,
                _LAST,
                most,
                PAGE,
                GROUP,
            )
            cut = tl.maximum(floor, min_p_floor)
            if (top_k > 0) & (held > top_k):
                lower = _ordered(floor).to(tl.int64)
                upper = _ordered(most).to(tl.int64) + 1
                while upper - lower > 1:
                    middle = (lower + upper) >> 1
                    reaching, mass = _ahead(
                        logits,
                        vocab,
                        scale,
                        listed,
                        num_listed,
                        num_groups,
                        _from_ordered(middle.to(tl.int32)),
                        _LAST,
                        most,
                        PAGE,
                        GROUP,
                    )
                    enough = reaching >= top_k
                    lower = tl.where(enough, middle, lower)
                    upper = tl.where(enough, upper, middle)
                kth = _from_ordered(lower.to(tl.int32))
                above, mass = _ahead(
                    logits, vocab, scale, listed, num_listed, num_groups, kth, -1, most, PAGE, GROUP
                )
                total = mass + (top_k - above) * tl.exp(kth - most)
                cut = tl.maximum(cut, kth)

            # `_scan` has drawn from all tokens unless the row is bounded.
            drawn = tl.where(bounded, _LAST, token)
            score = tl.load(logits + token).to(tl.float32) * scale
            score = tl.where(bounded, float("-inf"), score)
            searching = 1
            while searching > 0:
                kept = score >= cut
                if kept & ((top_k > 0) | (top_p < 1)):
                    rank, mass = _ahead(
                        logits,
                        vocab,
                        scale,
                        listed,
                        num_listed,
                        num_groups,
                        score,
                        drawn,
                        most,
                        PAGE,
                        GROUP,
                    )
                    in_top_k = (top_k == 0) | (rank < top_k)
                    in_top_p = (top_p >= 1) | (mass < top_p * total)
                    kept = (in_top_k & in_top_p) | (rank == 0)
                if kept:
                    token = drawn
                    searching = 0
                else:
                    drawn = _draw_before(
                        logits,
                        vocab,
                        scale,
                        listed,
                        num_listed,
                        num_groups,
                        cut,
                        score,
                        drawn,
                        low,
                        high,
                        PAGE,
                        GROUP,
                    )
                    # Without NaNs there always is one.
                    searching = tl.where(drawn < _LAST, 1, 0)
                    score = tl.load(logits + tl.where(drawn < _LAST, drawn, 0)).to(tl.float32)
                    score = score * scale
    tl.store(sampled_ptr + row, token.to(tl.int64))


@triton.jit
def _bound(maxima, most, k):
    """A score that at least k of the groups' maxima reach, and not many more; float32's lowest if
    fewer than k are finite."""
    finite = maxima > float("-inf")
    reaching = tl.sum(finite.to(tl.int32), 0)
    least = tl.min(tl.where(finite, maxima, most), 0)
    lower = tl.where(reaching >= k, least, _LOWEST)
    upper = tl.where(reaching >= k, most, _LOWEST)
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
def _page(
    logits,
    vocab,
    scale,
    listed,
    start,
    num_listed,
    num_groups,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Scores and token ids [PAGE, GROUP] of the listed groups from `start` on; -inf beyond."""
    at = start + tl.arange(0, PAGE)
    present = at < num_listed
    # Where all groups are listed, nothing needs to wait for the list.
    to_read = tl.where(num_listed < num_groups, num_listed, 0)
    groups = tl.load(listed + at, mask=at < to_read, other=0)
    groups = tl.where(num_listed < num_groups, groups, at)
    ids = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = present[:, None] & (ids < vocab)
    scores = tl.load(logits + ids, mask=inside, other=float("-inf")).to(tl.float32) * scale
    return scores, ids


@triton.jit
def _before(scores, ids, than_scores, than_ids):
    """Which come before the others in the order (score descending, id ascending)."""
    return (scores > than_scores) | ((scores == than_scores) & (ids < than_ids))


@triton.jit
def _ahead(
    logits,
    vocab,
    scale,
    listed,
    num_listed,
    num_groups,
    score,
    token,
    most,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """How many listed tokens come before (score, token), and the sum of their weights, relative to
    that of the highest score."""
    counts = tl.zeros([PAGE], tl.int32)
    masses = tl.zeros([PAGE], tl.float32)
    for start in range(0, num_listed, PAGE):
        scores, ids = _page(
            logits, vocab, scale, listed, start, num_listed, num_groups, PAGE, GROUP
        )
        ahead = _before(scores, ids, score, token) & (scores > float("-inf"))
        counts += tl.sum(ahead.to(tl.int32), 1)
        masses += tl.sum(tl.where(ahead, tl.exp(scores - most), 0.0), 1)
    return tl.sum(counts, 0), tl.sum(masses, 0)


@triton.jit
def _draw_before(
    logits,
    vocab,
    scale,
    listed,
    num_listed,
    num_groups,
    cut,
    score,
    token,
    low,
    high,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The one with the highest score + noise of the listed tokens that come before (score, token)
    and reach `cut`; _LAST if there are none."""
    best = float("-inf")
    best_id = _LAST
    for start in range(0, num_listed, PAGE):
        scores, ids = _page(
            logits, vocab, scale, listed, start, num_listed, num_groups, PAGE, GROUP
        )
        eligible = _before(scores, ids, score, token) & (scores >= cut)
        scores = tl.where(eligible, scores, float("-inf"))
        best, best_id = _contest(scores, 1.0, ids, best, best_id, True, low, high)
    return best_id


@triton.jit
def _contest(logits, scale, ids, best, best_id, noisy, low, high):
    """The best score so far, or if `noisy` score + noise, and its token, after these contested it.

    Most tokens cannot win, whatever the exact value of their noise -log(E): as E = -log(1 - u) is
    at least u, one whose u is above exp(score - best) cannot. Two logarithms are saved so.
    """
    if noisy:
        # Of the 31 bits of u, with a little more for all that is rounded.
        more = 31.001 - best * _LOG2_E + tl.abs(best) * 1e-6
        room = tl.exp2(tl.fma(logits, tl.zeros_like(logits) + scale * _LOG2_E, more))
        promising = tl.max(tl.max((_bits(low, high, ids) < room).to(tl.int32), 1), 0) > 0
    else:
        promising = tl.max(tl.max(logits, 1), 0) * scale > best
    if promising:
        scores = logits * scale
        if noisy:
            scores = scores + _gumbel(_bits(low, high, ids))
        highest = tl.max(tl.max(scores, 1), 0)
        if highest > best:
            best = highest
            best_id = tl.min(tl.min(tl.where(scores == highest, ids, _LAST), 1), 0)
    return best, best_id


@triton.jit
def _ordered(x):
    """An int32 for each float32, in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _from_ordered(bits):
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _scale(temperature):
    return tl.div_rn(1.0, tl.maximum(temperature, _MIN_TEMPERATURE))


# The random stream: see stream.py ----------------------------------------------------------------


@triton.jit
def _row_key(seed, position):
    key = _mix64(_mix64(seed.to(tl.uint64)) + position.to(tl.uint64))
    return (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def _mix64(x):
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _bits(low, high, tokens):
    """The 31 random bits of each token, as float32."""
    bits = tokens.to(tl.uint32) ^ low
    bits = bits ^ (bits >> 16)
    bits = bits * 0x21F0AAAD
    bits = bits ^ high
    bits = bits ^ (bits >> 15)
    bits = bits * 0xD35A2D97
    bits = bits ^ (bits >> 15)
    return (bits & 0x7FFFFFFF).to(tl.float32)


@triton.jit
def _gumbel(bits):
    """-log(exponential_noise), to 1e-6."""
    u = (bits + 0.5) * _UNIT
    # -log(1 - u), of which 1 - u rounded would leave too little where u is small: there it is u
    # times the Chebyshev interpolation of -log(1 - u) / u over [0, 1/4], good to 4e-8.
    series = 0.33863464 * u + 0.14463115
    series = series * u + 0.25764420
    series = series * u + 0.33287035
    series = series * u + 0.50001008
    series = series * u + 0.99999996
    exponential = tl.where(u < 0.25, series * u, tl.log2(1.0 - u) * -_LN_2)
    return tl.log2(exponential) * -_LN_2
