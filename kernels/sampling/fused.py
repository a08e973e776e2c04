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

from nanovllm.kernels.overlap import await_previous, begin, overlapped
from nanovllm.kernels.sampling.device_stream import LN_2, gumbel, row_key, token_bits
from nanovllm.kernels.sampling.order import (
    LAST,
    LOWEST,
    before,
    bound,
    contest,
    draw_before,
    from_ordered,
    ordered,
    page,
    standing,
)
from nanovllm.kernels.sampling.reference import MIN_TEMPERATURE, SamplingTensors


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
        **overlapped(),
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
        **overlapped(),
    )
    return sampled


_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)


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
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    await_previous(OVERLAP)
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
    low, high = row_key(tl.load(seed_ptr + row), tl.load(positions_ptr + row))

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
        best, best_id = contest(values, scale, ids, best, best_id, noisy, low, high)
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
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    await_previous(OVERLAP)
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
    best_ids = tl.load(best_ids_ptr + row * chunks + parts, mask=present, other=LAST)
    token = tl.min(tl.where(best == tl.max(best, 0), best_ids, LAST), 0)

    if (temperature > 0) & (bounded | (top_p < 1)):
        scale = _scale(temperature)
        low, high = row_key(tl.load(seed_ptr + row), tl.load(positions_ptr + row))
        logits = logits_ptr + row.to(tl.int64) * stride
        num_groups = tl.cdiv(vocab, GROUP)
        groups = tl.arange(0, GROUPS)
        maxima = tl.load(
            maxima_ptr + row.to(tl.int64) * num_groups + groups,
            mask=groups < num_groups,
            other=float("-inf"),
        )
        most = tl.max(maxima, 0)
        min_p_floor = most + tl.log2(tl.where(min_p > 0, min_p, 1.0)) * LN_2
        min_p_floor = tl.where(min_p > 0, min_p_floor, LOWEST)
        # No kept token is below the floor; and as top-p is of the mass that top-k leaves, all of
        # that is above it.
        floor = tl.where(top_p < 1, LOWEST, min_p_floor)
        if top_k > 0:
            floor = tl.maximum(floor, bound(maxima, most, top_k))
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
                scores, ids = page(
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
            ids = tl.load(candidate_ids + lanes, mask=inside, other=LAST)
            ranks = tl.zeros([CANDIDATES], tl.int32)
            likelier = tl.zeros([CANDIDATES], tl.float32)
            for first in range(0, gathered, PAIRS):
                others = first + tl.arange(0, PAIRS)
                other_scores = tl.load(
                    candidates + others, mask=others < gathered, other=float("-inf")
                )
                other_ids = tl.load(candidate_ids + others, mask=others < gathered, other=LAST)
                ahead = before(
                    other_scores[None, :], other_ids[None, :], scores[:, None], ids[:, None]
                )
                weights = tl.exp(other_scores - most)[None, :]
                ranks += tl.sum(ahead.to(tl.int32), 1)
                likelier += tl.sum(tl.where(ahead, weights, 0.0), 1)
            in_top_k = inside & (ranks < tl.where(top_k > 0, top_k, CANDIDATES))
            total = tl.sum(tl.where(in_top_k, tl.exp(scores - most), 0.0), 0)
            in_top_p = likelier < tl.where(top_p < 1, top_p * total, float("inf"))
            kept = in_top_k & ((in_top_p & (scores >= min_p_floor)) | (ranks == 0))
            noisy = tl.where(kept, scores + gumbel(token_bits(low, high, ids)), float("-inf"))
            found = tl.min(tl.where(kept & (noisy == tl.max(noisy, 0)), ids, LAST), 0)
            token = tl.where(found < LAST, found, token)
        else:
            held, total = standing(
                logits,
                vocab,
                scale,
                listed,
                num_listed,
                num_groups,
                floor,
                LAST,
                most,
                PAGE,
                GROUP,
            )
            cut = tl.maximum(floor, min_p_floor)
            if (top_k > 0) & (held > top_k):
                lower = ordered(floor).to(tl.int64)
                upper = ordered(most).to(tl.int64) + 1
                while upper - lower > 1:
                    middle = (lower + upper) >> 1
                    reaching, mass = standing(
                        logits,
                        vocab,
                        scale,
                        listed,
                        num_listed,
                        num_groups,
                        from_ordered(middle.to(tl.int32)),
                        LAST,
                        most,
                        PAGE,
                        GROUP,
                    )
                    enough = reaching >= top_k
                    lower = tl.where(enough, middle, lower)
                    upper = tl.where(enough, upper, middle)
                kth = from_ordered(lower.to(tl.int32))
                above, mass = standing(
                    logits, vocab, scale, listed, num_listed, num_groups, kth, -1, most, PAGE, GROUP
                )
                total = mass + (top_k - above) * tl.exp(kth - most)
                cut = tl.maximum(cut, kth)

            # `_scan` has drawn from all tokens unless the row is bounded.
            drawn = tl.where(bounded, LAST, token)
            score = tl.load(logits + token).to(tl.float32) * scale
            score = tl.where(bounded, float("-inf"), score)
            searching = 1
            while searching > 0:
                kept = score >= cut
                if kept & ((top_k > 0) | (top_p < 1)):
                    rank, mass = standing(
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
                    drawn = draw_before(
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
                    searching = tl.where(drawn < LAST, 1, 0)
                    score = tl.load(logits + tl.where(drawn < LAST, drawn, 0)).to(tl.float32)
                    score = score * scale
    tl.store(sampled_ptr + row, token.to(tl.int64))


@triton.jit
def _scale(temperature):
    return tl.div_rn(1.0, tl.maximum(temperature, _MIN_TEMPERATURE))
