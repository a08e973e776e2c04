"""Paged prefill attention in Triton: causal, over ragged batches with any context before them.

One program has a tile of one sequence's query tokens and one key/value head, all of whose query
heads are rows of the tile, so that keys and values are read once for them. It goes over the keys
that any of its rows sees, with an online softmax (Dao et al., 2022, "FlashAttention"); only those
that not every row sees are masked. Where tiles are too few to occupy the GPU, contexts are taken in
parts.

The host knows bounds of lengths only. So tiles are numbered through all sequences, and each program
finds its own; how far a context is split is decided where its length is known.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.kernels.attention.device import Device
from nanovllm.kernels.attention.interface import (
    AttentionBackend,
    AttentionBatch,
    AttentionMetadata,
    AttentionShape,
    LayerCache,
)
from nanovllm.kernels.attention.parts import Parts
from nanovllm.kernels.attention.prefill_cuts import (
    SHORTEST_PART,
    Tuning,
    choose_splits,
    choose_tuning,
    most_tiles,
)
from nanovllm.kernels.overlap import await_previous, begin, overlapped


class TritonPrefillBackend(AttentionBackend):
    """Any batch, but made for prefills. Any block size that is a multiple of 16."""

    def __init__(
        self, shape: AttentionShape, tuning: Tuning | None = None, device: Device | None = None
    ) -> None:
        super().__init__(shape)
        self._tuning = tuning
        self._device = device or Device.current()

    def prepare(self, metadata: AttentionMetadata) -> AttentionBatch:
        return _Prefills(self.shape, self._tuning, self._device, metadata)


class _Cut(NamedTuple):
    """How a batch is cut up, the same for all layers.

    Attributes:
        rows: of a tile.
        grid: key/value heads, parts of a context, tiles.
        parts: if there are more than one.
        descriptors: whether tiles of keys are fetched by them.
    """

    tuning: Tuning
    rows: int
    grid: tuple[int, int, int]
    parts: Parts | None
    descriptors: bool


class _Prefills(AttentionBatch):
    def __init__(
        self,
        shape: AttentionShape,
        tuning: Tuning | None,
        device: Device,
        metadata: AttentionMetadata,
    ) -> None:
        self._shape = shape
        self._tuning = tuning
        self._device = device
        self._metadata = metadata
        self._cut: _Cut | None = None

    def write(self, q: Tensor, cache: LayerCache, out: Tensor) -> None:
        if self._cut is None:
            self._cut = self._cut_up(q)
        shape, metadata = self._shape, self._metadata
        tuning, rows, grid, parts, descriptors = self._cut
        _prefill[grid](
            q,
            *cache,
            *(_described(held, tuning.keys) if descriptors else held for held in cache),
            out,
            *(parts or (out, out)),
            metadata.block_tables,
            metadata.cu_seqlens_q,
            metadata.cache_seqlens,
            metadata.block_tables.stride(0),
            len(metadata.query_lens),
            shape.head_dim**-0.5 * math.log2(math.e),
            SPLIT=parts is not None,
            GROUP=shape.num_heads // shape.num_kv_heads,
            HEADS=shape.num_kv_heads,
            DIM=shape.head_dim,
            BLOCK=shape.block_size,
            ROWS=rows,
            KEYS=tuning.keys,
            DESCRIPTORS=descriptors,
            PART=SHORTEST_PART,
            num_warps=tuning.warps,
            num_stages=tuning.stages,
            **overlapped(),
        )
        if parts is not None:
            parts.join(out)

    def _cut_up(self, q: Tensor) -> _Cut:
        shape, metadata, device = self._shape, self._metadata, self._device
        tuning = self._tuning or choose_tuning(shape.head_dim, q.dtype, device)
        group = shape.num_heads // shape.num_kv_heads
        rows = max(tuning.rows, triton.next_power_of_2(group))
        tokens = rows // group
        # As many programs as one sequence would have: there may be more, of short contexts.
        programs = -(-len(q) // tokens) * shape.num_kv_heads
        slots = device.processors * tuning.programs
        splits = choose_splits(programs, slots, int(metadata.context_lens.max()))
        return _Cut(
            tuning,
            rows,
            grid=(shape.num_kv_heads, splits, most_tiles(metadata, len(q), tokens)),
            parts=Parts.of(len(q), shape, splits, q.device) if splits > 1 else None,
            descriptors=tuning.descriptors
            and device.descriptors
            and shape.block_size % tuning.keys == 0,
        )


def _described(held: Tensor, keys: int) -> TensorDescriptor:
    """Keys or values as rows [blocks * block_size, heads * head_dim], of which a tile has `keys`
    and one head."""
    rows = held.flatten(2).flatten(0, 1)
    return TensorDescriptor.from_tensor(rows, [keys, held.shape[-1]])


# A score that has no weight beside any other. Finite, for a part may have rows that see none of it;
# and a power of two, so that its product with the scale is exact, fused or not: among themselves
# such scores have weights of 1.
UNSEEN = tl.constexpr(-(2.0**100))


@triton.jit
def _find(starts_ptr, sequences, tile, TOKENS: tl.constexpr):
    """The sequence that has tile number `tile`, or `sequences` if none has, and which of its tiles
    that is: a sequence's last tiles come first, since they see the longest contexts."""
    sequence = 0
    passed = 0
    counted = 0
    found = 0
    for first in range(0, sequences, 32):
        rows = first + tl.arange(0, 32)
        there = rows < sequences
        starts = tl.load(starts_ptr + rows, mask=there, other=0)
        ends = tl.load(starts_ptr + rows + 1, mask=there, other=0)
        tiles = tl.cdiv(ends - starts, TOKENS)
        before = counted + tl.cumsum(tiles, 0) - tiles
        passing = there & (before + tiles <= tile)
        sequence += tl.sum(passing.to(tl.int32), 0)
        passed += tl.sum(tl.where(passing, tiles, 0), 0)
        found += tl.sum(tl.where((before <= tile) & (tile < before + tiles), tiles, 0), 0)
        counted += tl.sum(tiles, 0)
    return sequence, found - 1 - (tile - passed)


@triton.jit
def _over_keys(
    q,
    most,
    total,
    mixed,
    start,
    end,
    seen,  # [ROWS], how many keys each row sees
    keys,  # what `_prefill` has, or where DESCRIPTORS is off pointers to it
    values,
    table,
    head,
    scale,
    MASKED: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Takes keys [start, end) into account; `start` is a multiple of KEYS."""
    dims = tl.arange(0, DIM)
    # Known a tile ahead, so that the tile itself is fetched ahead of its use.
    block = tl.load(table + tl.minimum(start, end - 1) // BLOCK)
    # The masked keys are few; with three stages for them, two programs would not fit.
    for first in tl.range(start, end, KEYS, num_stages=2 if MASKED else None):
        positions = first + tl.arange(0, KEYS)
        if BLOCK % KEYS == 0:
            slot = block * BLOCK + first % BLOCK
            block = tl.load(table + tl.minimum(first + KEYS, end - 1) // BLOCK)
            slots = slot.to(tl.int64) + tl.arange(0, KEYS)
        else:
            blocks = tl.load(table + positions // BLOCK, mask=positions < end, other=0)
            slots = blocks.to(tl.int64) * BLOCK + positions % BLOCK
        offsets = (slots * HEADS + head)[:, None] * DIM + dims[None, :]
        inside = (positions < end)[:, None]
        if DESCRIPTORS:
            k = keys.load([slot, head * DIM])
        else:
            k = tl.load(keys + offsets, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            scores = tl.where(positions[None, :] < seen[:, None], scores, UNSEEN)
        new_most = tl.maximum(most, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_most[:, None])
        shrink = tl.exp2(most - new_most)
        total = total * shrink + tl.sum(weights, 1)
        if DESCRIPTORS:
            v = values.load([slot, head * DIM])
        else:
            v = tl.load(values + offsets, mask=inside, other=0.0)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(weights.to(v.dtype), v, mixed, input_precision="ieee")
        most = new_most
    return most, total, mixed


@triton.jit(
    do_not_specialize=["table_stride", "sequences"],
    do_not_specialize_on_alignment=["tables_ptr", "starts_ptr", "lengths_ptr"],
)
def _prefill(
    q_ptr,  # [tokens, HEADS * GROUP, DIM]
    k_ptr,  # [blocks, BLOCK, HEADS, DIM]
    v_ptr,
    keys,  # the same, or where DESCRIPTORS is on, see _described
    values,
    out_ptr,  # as q
    parts_ptr,  # see Parts
    logs_ptr,
    tables_ptr,
    starts_ptr,
    lengths_ptr,
    table_stride,
    sequences,
    scale,  # of the scores, in base 2
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PART: tl.constexpr,  # keys that a part has at least
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    await_previous(OVERLAP)
    TOKENS: tl.constexpr = ROWS // GROUP
    head = tl.program_id(0)
    split = tl.program_id(1)
    tile = tl.program_id(2)
    splits = tl.num_programs(1)
    sequence, own_tile = _find(starts_ptr, sequences, tile, TOKENS)
    if sequence >= sequences:
        return
    start = tl.load(starts_ptr + sequence)
    queries = tl.load(starts_ptr + sequence + 1) - start
    before = tl.load(lengths_ptr + sequence) - queries
    first_query = own_tile * TOKENS
    end = before + tl.minimum(first_query + TOKENS, queries)
    each = tl.cdiv(tl.maximum(tl.cdiv(end, splits), PART), KEYS) * KEYS
    parts = tl.cdiv(end, each)
    first_key = split * each

    tokens = first_query + tl.arange(0, ROWS) // GROUP
    present = (tokens < queries) & (tl.arange(0, ROWS) < TOKENS * GROUP)
    members = tl.arange(0, ROWS) % GROUP
    rows = (start + tokens).to(tl.int64) * (HEADS * GROUP) + head * GROUP + members
    if SPLIT:
        used = tl.where(parts > 1, parts, 0)
        unused = present & (tokens < tl.where(split < used, 0, queries))
        tl.store(logs_ptr + rows * splits + split, float("-inf"), mask=unused)
    if split >= parts:
        return
    end = tl.minimum(end, first_key + each)
    dims = tl.arange(0, DIM)
    offsets = rows[:, None] * DIM + dims[None, :]
    q = tl.load(q_ptr + offsets, mask=present[:, None], other=0.0)

    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIM], tl.float32)
    table = tables_ptr + sequence.to(tl.int64) * table_stride
    seen = before + tokens + 1
    seen_by_all = tl.minimum((before + first_query + 1) // KEYS * KEYS, end)
    seen_by_all = tl.maximum(seen_by_all // KEYS * KEYS, first_key)
    most, total, mixed = _over_keys(
        q, most, total, mixed, first_key, seen_by_all, seen, keys, values, table, head, scale,
        False, HEADS, DIM, BLOCK, KEYS, DESCRIPTORS,
    )  # fmt: skip
    most, total, mixed = _over_keys(
        q, most, total, mixed, seen_by_all, end, seen, k_ptr, v_ptr, table, head, scale,
        True, HEADS, DIM, BLOCK, KEYS, False,
    )  # fmt: skip
    mixed = mixed / total[:, None]

    if parts == 1:
        tl.store(out_ptr + offsets, mixed.to(out_ptr.dtype.element_ty), mask=present[:, None])
    elif SPLIT:
        tl.store(logs_ptr + rows * splits + split, most + tl.log2(total), mask=present)
        ours = (rows * splits + split)[:, None] * DIM + dims[None, :]
        tl.store(parts_ptr + ours, mixed, mask=present[:, None])
