"""The first kernel of sampling, which reads all logits once; and the tuning of all of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.overlap import await_previous, launch_next, overlapped
from nanovllm.kernels.sampling.filters import update_best
from nanovllm.kernels.sampling.random_stream_triton import row_key
from nanovllm.kernels.sampling.reference import MIN_TEMPERATURE, NOT_FINITE, SamplingTensors


class SamplingTuning(NamedTuple):
    """How sampling is cut; all but `programs` are powers of two.

    Attributes:
        group: tokens of a group, whose highest score is noted.
        tile: groups that a program of `_scan` takes at a time.
        programs: programs of `_scan`, if there is work for as many.
        page: groups that the second kernel takes at a time, when it reads many.
        gather: groups that it takes at a time, when it gathers candidates.
        candidates: the most candidates that are compared in pairs.
        pairs: candidates that each is compared with at a time.
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


DEFAULT_TUNING = SamplingTuning()


class Scanned(NamedTuple):
    """The results of reading logits [n, vocab], a row in chunks.

    Attributes:
        best: float32 [n, chunks], the highest score + noise of each chunk, or its highest logit if
            the row is greedy or has a top-k or min-p.
        best_ids: int32 [n, chunks], the token of `best`. A chunk with NaN or inf has (inf,
            NOT_FINITE).
        maxima: float32 [n, groups], the highest score of each group; of filtered rows only.
        max_chunks: the most chunks that there can be, for any n.
    """

    best: Tensor
    best_ids: Tensor
    maxima: Tensor
    max_chunks: int


def scan(
    logits: Tensor,
    params: SamplingTensors,
    positions: Tensor,
    tuning: SamplingTuning,
    first: int,
    off_from: int,
) -> Scanned:
    """Reads the logits once.

    Args:
        logits: float32, bfloat16 or float16 [n, vocab], n > 0; each row contiguous.
        positions: int64 [n]. The logits of a row with a negative position are not read.
        first: the token id of the first column.
        off_from: a top-k of this or more is ignored.
    """
    rows, vocab = logits.shape
    tiles = triton.cdiv(vocab, tuning.tile * tuning.group)
    tiles_each = triton.cdiv(tiles, max(1, min(tiles, tuning.programs // rows)))
    chunks = triton.cdiv(tiles, tiles_each)
    groups = triton.cdiv(vocab, tuning.group)
    best = torch.empty(rows, chunks, dtype=torch.float32, device=logits.device)
    best_ids = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    maxima = torch.empty(rows, groups, dtype=torch.float32, device=logits.device)
    _scan[(rows, chunks)](
        logits,
        logits.stride(0),
        vocab,
        first,
        off_from,
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
    return Scanned(best, best_ids, maxima, tiles)


_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
_NOT_FINITE = tl.constexpr(NOT_FINITE)


@triton.jit(do_not_specialize=["first", "tiles_each"])
def _scan(
    logits_ptr,  # [n, vocab]
    stride,
    vocab,
    first,  # the token id of the first column
    off_from,  # a top-k of this or more is ignored
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    positions_ptr,
    best_ptr,  # float32 [n, chunks], see Scanned
    best_ids_ptr,  # int32 [n, chunks]
    maxima_ptr,  # float32 [n, groups]
    tiles_each,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    launch_next(OVERLAP)
    await_previous(OVERLAP)
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    top_k = tl.where(top_k < off_from, top_k, 0)
    random = temperature > 0
    scale = tl.where(random, scale_of(temperature), 1.0)
    bounded = (top_k > 0) | (min_p > 0)
    filtered = random & (bounded | (top_p < 1))
    noisy = random & (bounded == 0)
    position = tl.load(positions_ptr + row)
    low, high = row_key(tl.load(seed_ptr + row), position)

    tile_groups = tl.arange(0, TILE)
    within = tile_groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    logits = logits_ptr + row.to(tl.int64) * stride
    num_groups = tl.cdiv(vocab, GROUP)
    maxima = maxima_ptr + row.to(tl.int64) * num_groups
    first_tile = chunk * tiles_each
    best = float("-inf")
    best_id = first + first_tile * (TILE * GROUP)
    bad = tl.zeros((TILE, GROUP), tl.int1)
    last_tile = first_tile + tl.where(position < 0, 0, tiles_each)
    for tile in range(first_tile, last_tile):
        at = tile * (TILE * GROUP) + within
        values = tl.load(logits + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        bad |= (values < float("inf")) == 0  # NaN is not below either
        if filtered:
            groups = tile * TILE + tile_groups
            tl.store(maxima + groups, tl.max(values, 1) * scale, mask=groups < num_groups)
        best, best_id = update_best(values, scale, first + at, best, best_id, noisy, low, high)
    if tl.max(tl.max(bad.to(tl.int32), 1), 0) > 0:
        best = float("inf")
        best_id = _NOT_FINITE
    out = row * tl.num_programs(1) + chunk
    tl.store(best_ptr + out, best)
    tl.store(best_ids_ptr + out, best_id)


@triton.jit
def scale_of(temperature):
    return tl.div_rn(1.0, tl.maximum(temperature, _MIN_TEMPERATURE))
