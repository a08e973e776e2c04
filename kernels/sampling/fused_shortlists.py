"""`reference.shortlist` and `reference.sample_shortlists` in Triton, reading nothing back.

A shortlist begins with `_scan`, as `fused.sample` does. Then a program for each row lists the
groups whose maxima reach the k-th highest maximum, and gathers the tokens that reach it: the k
likeliest are among them. If these are too many, because many tokens are equal or high ones lie side
by side, the k-th highest score is found by bisection of its bits. Then the tokens above it are
gathered, and as many with that very score as are missing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.overlap import await_previous, launch_next, overlapped
from nanovllm.kernels.sampling import SHORTLIST_SIZE
from nanovllm.kernels.sampling.filters import (
    LAST,
    best_of_chunks,
    draw_candidate,
    from_ordered,
    gather,
    kth_lower_bound,
    kth_score,
    list_tokens,
    load_candidates,
    load_maxima,
    ordered,
    rank_candidates,
)
from nanovllm.kernels.sampling.random_stream_triton import row_key
from nanovllm.kernels.sampling.reference import NOT_FINITE, SamplingTensors
from nanovllm.kernels.sampling.scan import DEFAULT_TUNING, SamplingTuning, scale_of, scan


def shortlist(
    logits: Tensor,
    params: SamplingTensors,
    positions: Tensor,
    first: int,
    tuning: SamplingTuning = DEFAULT_TUNING,
) -> Tensor:
    """As `reference.shortlist`; each row of the logits is contiguous."""
    rows, shard = logits.shape
    sent = torch.empty(rows, 2 * SHORTLIST_SIZE, dtype=torch.int32, device=logits.device)
    if not rows:
        return sent
    best, best_ids, maxima, max_chunks = scan(
        logits, params, positions, tuning, first, SHORTLIST_SIZE + 1
    )
    groups = maxima.shape[1]

    def scratch(columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=logits.device)

    _shortlist[(rows,)](
        logits,
        logits.stride(0),
        shard,
        first,
        params.temperature,
        params.top_k,
        best,
        best_ids,
        maxima,
        scratch(groups, torch.int32),
        scratch(tuning.candidates, torch.float32),
        scratch(tuning.candidates, torch.int32),
        sent.view(torch.float32),
        sent,
        best.shape[1],
        CHUNKS=triton.next_power_of_2(max_chunks),
        GROUPS=triton.next_power_of_2(groups),
        GROUP=tuning.group,
        PAGE=tuning.page,
        GATHER=tuning.gather,
        GATHERED=tuning.candidates,
        PAIRS=tuning.pairs,
        SHORTLIST=SHORTLIST_SIZE,
        num_warps=tuning.choose_warps,
        enable_fp_fusion=False,
        **overlapped(),
    )
    return sent


def sample_shortlists(
    shortlists: Tensor,
    params: SamplingTensors,
    positions: Tensor,
    out: Tensor | None = None,
    tuning: SamplingTuning = DEFAULT_TUNING,
) -> Tensor:
    """As `reference.sample_shortlists`; the shortlists are contiguous."""
    rows, columns = shortlists.shape
    sampled = torch.empty_like(positions) if out is None else out
    if not rows:
        return sampled
    _choose[(rows,)](
        shortlists.view(torch.float32),
        shortlists,
        *params,
        positions,
        sampled,
        ENTRIES=columns // 2,
        COLUMNS=triton.next_power_of_2(columns // 2),
        PAIRS=tuning.pairs,
        SHORTLIST=SHORTLIST_SIZE,
        num_warps=tuning.choose_warps,
        enable_fp_fusion=False,
        **overlapped(),
    )
    return sampled


_NOT_FINITE = tl.constexpr(NOT_FINITE)


@triton.jit(do_not_specialize=["first", "chunks"])
def _shortlist(
    logits_ptr,  # [n, shard]
    stride,
    shard,
    first,
    temperature_ptr,
    top_k_ptr,
    best_ptr,  # see `scan.Scanned`
    best_ids_ptr,
    maxima_ptr,
    listed_ptr,  # int32 [n, groups], scratch: groups with tokens that may be among the likeliest
    gathered_ptr,  # float32 [n, GATHERED], scratch: scores
    gathered_ids_ptr,  # int32 [n, GATHERED], scratch: columns
    scores_ptr,  # float32 [n, 2, SHORTLIST], of which [:, 0] are scores
    ids_ptr,  # int32, the same memory, of which [:, 1] are token ids
    chunks,
    CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    GATHER: tl.constexpr,
    GATHERED: tl.constexpr,
    PAIRS: tl.constexpr,
    SHORTLIST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    launch_next(OVERLAP)
    await_previous(OVERLAP)
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    out = row * (2 * SHORTLIST)
    entries = tl.arange(0, SHORTLIST)
    best, token = best_of_chunks(best_ptr, best_ids_ptr, row, chunks, CHUNKS)
    if (token >= 0) & (temperature > 0) & (top_k > 0) & (top_k <= SHORTLIST):
        scale = scale_of(temperature)
        logits = logits_ptr + row.to(tl.int64) * stride
        num_groups = tl.cdiv(shard, GROUP)
        maxima = load_maxima(maxima_ptr, row, num_groups, GROUPS)
        peak = tl.max(maxima, 0)
        floor = kth_lower_bound(maxima, peak, top_k)
        listed = listed_ptr + row.to(tl.int64) * num_groups
        tokens = list_tokens(logits, shard, scale, maxima, floor, listed, num_groups, GROUPS)

        held = gathered_ptr + row * GATHERED
        held_ids = gathered_ids_ptr + row * GATHERED
        count = 0  # a variable, since the compiler takes no literal as a loop's initial value
        count = gather(tokens, floor, float("inf"), held, held_ids, count, GATHERED, GATHER, GROUP)
        if count > GATHERED:
            kth = kth_score(tokens, floor, peak, top_k, PAGE, GROUP)
            tl.debug_barrier()
            above = from_ordered(ordered(kth) + 1)
            count = 0
            count = gather(
                tokens, above, float("inf"), held, held_ids, count, GATHERED, GATHER, GROUP
            )
            count = gather(tokens, kth, kth, held, held_ids, count, top_k, GATHER, GROUP)
            count = tl.minimum(count, top_k)
        tl.debug_barrier()

        scores, columns, ranks, _ = rank_candidates(
            held, held_ids, count, peak, GATHERED, GATHERED, PAIRS
        )
        taken = (columns < LAST) & (ranks < top_k)
        tl.store(scores_ptr + out + ranks, scores, mask=taken)
        tl.store(ids_ptr + out + SHORTLIST + ranks, first + columns, mask=taken)
        none = entries >= tl.minimum(count, top_k)
        tl.store(scores_ptr + out + entries, float("-inf"), mask=none)
        tl.store(ids_ptr + out + SHORTLIST + entries, LAST, mask=none)
    else:
        tl.store(scores_ptr + out + entries, tl.where(entries == 0, best, float("-inf")))
        tl.store(ids_ptr + out + SHORTLIST + entries, tl.where(entries == 0, token, LAST))


@triton.jit
def _choose(
    scores_ptr,  # float32 [n, shards, 2, SHORTLIST], of which [:, :, 0] are scores
    ids_ptr,  # int32, the same memory, of which [:, :, 1] are token ids
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    positions_ptr,
    sampled_ptr,  # int64 [n]
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr,
    SHORTLIST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    launch_next(OVERLAP)
    await_previous(OVERLAP)
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    scores_of = scores_ptr + row * (2 * ENTRIES)
    ids_of = ids_ptr + row * (2 * ENTRIES) + SHORTLIST
    scores, ids = load_candidates(scores_of, ids_of, tl.arange(0, COLUMNS), ENTRIES, SHORTLIST)
    peak = tl.max(scores, 0)
    token = tl.min(tl.where(scores == peak, ids, LAST), 0)
    token = tl.where(peak > float("-inf"), token, _NOT_FINITE)
    if (token >= 0) & (temperature > 0) & (top_k > 0) & (top_k <= SHORTLIST):
        low, high = row_key(tl.load(seed_ptr + row), tl.load(positions_ptr + row))
        token = draw_candidate(
            scores_of,
            ids_of,
            ENTRIES,
            peak,
            top_k,
            tl.load(top_p_ptr + row),
            tl.load(min_p_ptr + row),
            low,
            high,
            COLUMNS,
            SHORTLIST,
            PAIRS,
        )
    tl.store(sampled_ptr + row, token.to(tl.int64))
