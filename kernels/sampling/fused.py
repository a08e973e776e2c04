"""Sampling from whole logits in two kernels, for any mix of greedy, random and filtered rows.

`_scan` reads the logits once; a program takes a chunk of a row. Of a row without filters it finds
the chunk's best token, by its logit or by its score + noise. Of a filtered row it also notes the
highest score of each group of tokens.

`_choose` has a program for each row. The best token of all chunks is the token of a row without
filters. The tokens that filters keep are the first ones in the order (score descending, id
ascending), and the groups' maxima give a lower bound of their scores: with top-k the k-th highest
maximum, since at least k tokens are that high; with min-p a fixed distance from the highest score.
So all kept tokens are in the few groups that reach the bound.

- If at most CANDIDATES tokens reach it, they are gathered, and the filters are applied to all pairs
  of them.
- Else, as with top-p alone, the token is found by rejection: draw a token, and count the tokens and
  sum the weights before it. If the filters do not keep the token, they keep none after it, and the
  next token is drawn among those before it. For top-p after top-k, the k-th highest score is found
  first, by bisection of its bits.

The result is exact but for the rounding of sums: at the very edge of top-p or min-p (within about
1e-6) other tokens may be kept than `reference.sample` keeps. A row's token depends neither on other
rows nor on their number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.overlap import await_previous, launch_next, overlapped
from nanovllm.kernels.sampling.filters import (
    LAST,
    LOWEST,
    best_of_chunks,
    draw_before,
    draw_candidate,
    floor_of_min_p,
    gather,
    kth_lower_bound,
    kth_score,
    list_tokens,
    load_maxima,
    rank_and_mass,
)
from nanovllm.kernels.sampling.random_stream_triton import row_key
from nanovllm.kernels.sampling.reference import NOT_FINITE, SamplingTensors
from nanovllm.kernels.sampling.scan import DEFAULT_TUNING, SamplingTuning, scale_of, scan


def sample(
    logits: Tensor,
    params: SamplingTensors,
    positions: Tensor,
    out: Tensor | None = None,
    tuning: SamplingTuning = DEFAULT_TUNING,
) -> Tensor:
    """As `reference.sample`, but reads nothing back to the host.

    Args:
        logits: float32, bfloat16 or float16 [n, vocab]; each row contiguous.
        positions: int64 [n].
    """
    rows, vocab = logits.shape
    sampled = torch.empty_like(positions) if out is None else out
    if not rows:
        return sampled
    best, best_ids, maxima, max_chunks = scan(logits, params, positions, tuning, 0, vocab)
    groups = maxima.shape[1]

    def scratch(columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=logits.device)

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
        best.shape[1],
        CHUNKS=triton.next_power_of_2(max_chunks),
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


_NOT_FINITE = tl.constexpr(NOT_FINITE)


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
    candidates_ptr,  # float32 [n, CANDIDATES], scratch: scores
    candidate_ids_ptr,  # int32 [n, CANDIDATES], scratch: tokens
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
    launch_next(OVERLAP)
    await_previous(OVERLAP)
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    top_k = tl.where(top_k < vocab, top_k, 0)
    bounded = (top_k > 0) | (min_p > 0)

    best, token = best_of_chunks(best_ptr, best_ids_ptr, row, chunks, CHUNKS)
    token = tl.where(best > float("-inf"), token, _NOT_FINITE)

    if (token >= 0) & (temperature > 0) & (bounded | (top_p < 1)):
        scale = scale_of(temperature)
        low, high = row_key(tl.load(seed_ptr + row), tl.load(positions_ptr + row))
        logits = logits_ptr + row.to(tl.int64) * stride
        num_groups = tl.cdiv(vocab, GROUP)
        maxima = load_maxima(maxima_ptr, row, num_groups, GROUPS)
        peak = tl.max(maxima, 0)
        min_p_floor = floor_of_min_p(peak, min_p)
        # No kept token is below the floor. Top-p is of the mass that top-k leaves, all of which is
        # above the floor too.
        floor = tl.where(top_p < 1, LOWEST, min_p_floor)
        if top_k > 0:
            floor = tl.maximum(floor, kth_lower_bound(maxima, peak, top_k))
        listed = listed_ptr + row.to(tl.int64) * num_groups
        tokens = list_tokens(logits, vocab, scale, maxima, floor, listed, num_groups, GROUPS)

        candidates = candidates_ptr + row * CANDIDATES
        candidate_ids = candidate_ids_ptr + row * CANDIDATES
        gathered = 0
        if bounded:
            gathered = gather(
                tokens,
                floor,
                float("inf"),
                candidates,
                candidate_ids,
                gathered,
                CANDIDATES,
                GATHER,
                GROUP,
            )
            tl.debug_barrier()

        if bounded & (gathered <= CANDIDATES):
            found = draw_candidate(
                candidates,
                candidate_ids,
                gathered,
                peak,
                top_k,
                top_p,
                min_p,
                low,
                high,
                CANDIDATES,
                CANDIDATES,
                PAIRS,
            )
            token = tl.where(found < LAST, found, token)
        else:
            held, total = rank_and_mass(tokens, floor, LAST, peak, PAGE, GROUP)
            cut = tl.maximum(floor, min_p_floor)
            if (top_k > 0) & (held > top_k):
                kth = kth_score(tokens, floor, peak, top_k, PAGE, GROUP)
                above, mass = rank_and_mass(tokens, kth, -1, peak, PAGE, GROUP)
                total = mass + (top_k - above) * tl.exp(kth - peak)
                cut = tl.maximum(cut, kth)

            # `_scan` has drawn from all tokens unless the row is bounded.
            drawn = tl.where(bounded, LAST, token)
            score = tl.load(logits + token).to(tl.float32) * scale
            score = tl.where(bounded, float("-inf"), score)
            searching = 1
            while searching > 0:
                kept = score >= cut
                if kept & ((top_k > 0) | (top_p < 1)):
                    rank, mass = rank_and_mass(tokens, score, drawn, peak, PAGE, GROUP)
                    in_top_k = (top_k == 0) | (rank < top_k)
                    in_top_p = (top_p >= 1) | (mass < top_p * total)
                    kept = (in_top_k & in_top_p) | (rank == 0)
                if kept:
                    token = drawn
                    searching = 0
                else:
                    drawn = draw_before(tokens, cut, score, drawn, low, high, PAGE, GROUP)
                    # There is one, but for what rounding may do.
                    searching = tl.where(drawn < LAST, 1, 0)
                    score = tl.load(logits + tl.where(drawn < LAST, drawn, 0)).to(tl.float32)
                    score = score * scale
    tl.store(sampled_ptr + row, token.to(tl.int64))
