"""The functions of `candidates` in Triton, looking at nothing on the host.

A shard's shortlist begins with the reading of its logits that `fused.sample` begins with. Then, a
program for each row lists the groups of tokens whose maxima reach the k-th highest maximum, and
gathers the tokens that do: the k likeliest are among them. Where too many tokens are equal, or high
ones lie side by side, the k-th highest score is found by bisection of its bits, and those above it
are gathered, and as many with that very score as are missing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.overlap import await_previous, launch_next, overlapped
from nanovllm.kernels.sampling import CANDIDATES
from nanovllm.kernels.sampling.device_stream import row_key
from nanovllm.kernels.sampling.order import (
    LAST,
    best_of,
    bound,
    from_ordered,
    gather,
    kth_score,
    list_tokens,
    maxima_of,
    ordered,
)
from nanovllm.kernels.sampling.pairs import candidate, draw_among, ranked
from nanovllm.kernels.sampling.reference import SamplingTensors
from nanovllm.kernels.sampling.scan import DEFAULT_TUNING, Tuning, scale_of, scan


def shortlist(
    logits: Tensor,
    params: SamplingTensors,
    positions: Tensor,
    first: int,
    tuning: Tuning = DEFAULT_TUNING,
) -> Tensor:
    """See `candidates.shortlist`; each row of the logits is contiguous."""
    rows, shard = logits.shape
    sent = torch.empty(rows, 2 * CANDIDATES, dtype=torch.int32, device=logits.device)
    if not rows:
        return sent
    best, best_ids, maxima, most_chunks = scan(
        logits, params, positions, tuning, first, CANDIDATES + 1
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
        CHUNKS=triton.next_power_of_2(most_chunks),
        GROUPS=triton.next_power_of_2(groups),
        GROUP=tuning.group,
        PAGE=tuning.page,
        GATHER=tuning.gather,
        GATHERED=tuning.candidates,
        PAIRS=tuning.pairs,
        CANDIDATES=CANDIDATES,
        num_warps=tuning.choose_warps,
        enable_fp_fusion=False,
        **overlapped(),
    )
    return sent


def choose(
    shortlists: Tensor,
    params: SamplingTensors,
    positions: Tensor,
    tuning: Tuning = DEFAULT_TUNING,
) -> Tensor:
    """See `candidates.choose`; the shortlists are contiguous."""
    rows, columns = shortlists.shape
    sampled = torch.empty(rows, dtype=torch.int64, device=shortlists.device)
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
        CANDIDATES=CANDIDATES,
        num_warps=tuning.choose_warps,
        enable_fp_fusion=False,
        **overlapped(),
    )
    return sampled


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
    gathered_ptr,  # float32 [n, GATHERED], scratch: scores, and
    gathered_ids_ptr,  # int32 [n, GATHERED]: columns
    scores_ptr,  # float32 [n, 2, CANDIDATES]; only the first of the two,
    ids_ptr,  # int32, and of the same memory the second
    chunks,
    CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    GATHER: tl.constexpr,
    GATHERED: tl.constexpr,
    PAIRS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    launch_next(OVERLAP)
    await_previous(OVERLAP)
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    out = row * (2 * CANDIDATES)
    entries = tl.arange(0, CANDIDATES)
    if (temperature > 0) & (top_k > 0) & (top_k <= CANDIDATES):
        scale = scale_of(temperature)
        logits = logits_ptr + row.to(tl.int64) * stride
        num_groups = tl.cdiv(shard, GROUP)
        maxima = maxima_of(maxima_ptr, row, num_groups, GROUPS)
        most = tl.max(maxima, 0)
        floor = bound(maxima, most, top_k)
        listed = listed_ptr + row.to(tl.int64) * num_groups
        tokens = list_tokens(logits, shard, scale, maxima, floor, listed, num_groups, GROUPS)

        held = gathered_ptr + row * GATHERED
        held_ids = gathered_ids_ptr + row * GATHERED
        count = 0  # a variable: the compiler loops over no literal
        count = gather(tokens, floor, float("inf"), held, held_ids, count, GATHERED, GATHER, GROUP)
        if count > GATHERED:
            kth = kth_score(tokens, floor, most, top_k, PAGE, GROUP)
            tl.debug_barrier()
            above = from_ordered(ordered(kth) + 1)
            count = 0
            count = gather(
                tokens, above, float("inf"), held, held_ids, count, GATHERED, GATHER, GROUP
            )
            count = gather(tokens, kth, kth, held, held_ids, count, top_k, GATHER, GROUP)
            count = tl.minimum(count, top_k)
        tl.debug_barrier()

        scores, columns, ranks, _ = ranked(held, held_ids, count, most, GATHERED, GATHERED, PAIRS)
        taken = (columns < LAST) & (ranks < top_k)
        tl.store(scores_ptr + out + ranks, scores, mask=taken)
        tl.store(ids_ptr + out + CANDIDATES + ranks, first + columns, mask=taken)
        none = entries >= tl.minimum(count, top_k)
        tl.store(scores_ptr + out + entries, float("-inf"), mask=none)
        tl.store(ids_ptr + out + CANDIDATES + entries, LAST, mask=none)
    else:
        best, token = best_of(best_ptr, best_ids_ptr, row, chunks, CHUNKS)
        tl.store(scores_ptr + out + entries, tl.where(entries == 0, best, float("-inf")))
        tl.store(ids_ptr + out + CANDIDATES + entries, tl.where(entries == 0, token, LAST))


@triton.jit
def _choose(
    scores_ptr,  # float32 [n, shards, 2, CANDIDATES]; only the first of the two,
    ids_ptr,  # int32, and of the same memory the second
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
    CANDIDATES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    launch_next(OVERLAP)
    await_previous(OVERLAP)
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    scores_of = scores_ptr + row * (2 * ENTRIES)
    ids_of = ids_ptr + row * (2 * ENTRIES) + CANDIDATES
    scores, ids = candidate(scores_of, ids_of, tl.arange(0, COLUMNS), ENTRIES, CANDIDATES)
    most = tl.max(scores, 0)
    token = tl.min(tl.where(scores == most, ids, LAST), 0)
    if (temperature > 0) & (top_k > 0) & (top_k <= CANDIDATES):
        low, high = row_key(tl.load(seed_ptr + row), tl.load(positions_ptr + row))
        token = draw_among(
            scores_of,
            ids_of,
            ENTRIES,
            most,
            top_k,
            tl.load(top_p_ptr + row),
            tl.load(min_p_ptr + row),
            low,
            high,
            COLUMNS,
            CANDIDATES,
            PAIRS,
        )
    # There is one unless all logits are -inf.
    tl.store(sampled_ptr + row, tl.where(token < LAST, token, 0).to(tl.int64))
