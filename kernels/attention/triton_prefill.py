"""Paged prefill attention in Triton: causal, over ragged batches with any context before them.

A program takes one key/value head and a tile of one sequence's query tokens. All query heads of the
key/value head are rows of the tile, so that keys and values are read once for them. The program
goes over the keys that any of its rows may see, with an online softmax (Dao et al., 2022,
"FlashAttention"), and masks only the last keys, which some rows may not see. Contexts are split
where tiles are too few to occupy the GPU.

The host knows only bounds of the lengths. So tiles are numbered through all sequences and each
program finds its tile on the device; how many splits a context really needs is decided there too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.kernels.attention.interface import (
    AttentionBackend,
    AttentionBatch,
    AttentionMetadata,
    AttentionShape,
    LayerCache,
)
from nanovllm.kernels.attention.split_kv import SplitResults
from nanovllm.kernels.attention.tuning import (
    MIN_SPLIT_KEYS,
    Gpu,
    PrefillTuning,
    choose_prefill_splits,
    choose_prefill_tuning,
    max_prefill_tiles,
)
from nanovllm.kernels.overlap import await_previous, launch_next, overlapped


class TritonPrefillBackend(AttentionBackend):
    """Takes any batch, but is made for prefills; any block size that is a multiple of 16."""

    def __init__(
        self, shape: AttentionShape, tuning: PrefillTuning | None = None, gpu: Gpu | None = None
    ) -> None:
        super().__init__(shape)
        self._tuning = tuning
        self._gpu = gpu or Gpu.current()

    def prepare(self, metadata: AttentionMetadata) -> AttentionBatch:
        return _Prefills(self.shape, self._tuning, self._gpu, metadata)


class _Launch(NamedTuple):
    """How a batch is cut, the same for all layers.

    Attributes:
        rows: rows of a tile.
        grid: key/value heads, splits of a context, tiles.
        split_results: None without splits.
        descriptors: whether keys and values are fetched by tensor descriptors.
    """

    tuning: PrefillTuning
    rows: int
    grid: tuple[int, int, int]
    split_results: SplitResults | None
    descriptors: bool


class _Prefills(AttentionBatch):
    def __init__(
        self,
        shape: AttentionShape,
        tuning: PrefillTuning | None,
        gpu: Gpu,
        metadata: AttentionMetadata,
    ) -> None:
        self._shape = shape
        self._tuning = tuning
        self._gpu = gpu
        self._metadata = metadata
        self._launch: _Launch | None = None

    def write(self, q: Tensor, cache: LayerCache, out: Tensor) -> None:
        if self._launch is None:
            self._launch = self._plan_launch(q)
        shape, metadata = self._shape, self._metadata
        tuning, rows, grid, split_results, descriptors = self._launch
        _prefill[grid](
            q,
            *cache,
            *(_described(held, tuning.keys) if descriptors else held for held in cache),
            out,
            *(split_results or (out, out)),
            metadata.block_tables,
            metadata.cu_seqlens_q,
            metadata.cache_seqlens,
            metadata.block_tables.stride(0),
            len(metadata.query_lens),
            shape.head_dim**-0.5 * math.log2(math.e),
            SPLIT=split_results is not None,
            GROUP=shape.num_heads // shape.num_kv_heads,
            HEADS=shape.num_kv_heads,
            DIM=shape.head_dim,
            BLOCK=shape.block_size,
            ROWS=rows,
            KEYS=tuning.keys,
            DESCRIPTORS=descriptors,
            MIN_SPLIT=MIN_SPLIT_KEYS,
            num_warps=tuning.warps,
            num_stages=tuning.stages,
            **overlapped(),
        )
        if split_results is not None:
            split_results.combine(out)

    def _plan_launch(self, q: Tensor) -> _Launch:
        shape, metadata, gpu = self._shape, self._metadata, self._gpu
        tuning = self._tuning or choose_prefill_tuning(shape.head_dim, q.dtype, gpu)
        group = shape.num_heads // shape.num_kv_heads
        rows = max(tuning.rows, triton.next_power_of_2(group))
        tokens = rows // group
        # The programs of one sequence with all tokens. Short sequences may add more.
        programs = -(-len(q) // tokens) * shape.num_kv_heads
        at_once = gpu.processors * tuning.programs
        splits = choose_prefill_splits(programs, at_once, int(metadata.context_lens.max()))
        return _Launch(
            tuning,
            rows,
            grid=(shape.num_kv_heads, splits, max_prefill_tiles(metadata, len(q), tokens)),
            split_results=(
                SplitResults.empty(len(q), shape, splits, q.device) if splits > 1 else None
            ),
            descriptors=tuning.descriptors
            and gpu.descriptors
            and shape.block_size % tuning.keys == 0,
        )


def _described(held: Tensor, keys: int) -> TensorDescriptor:
    """Describes keys or values [blocks * block_size, heads * head_dim] in tiles of `keys` rows and
    one head."""
    rows = held.flatten(2).flatten(0, 1)
    return TensorDescriptor.from_tensor(rows, [keys, held.shape[-1]])


# The score of a key that a row may not see: no weight beside any other score. It is finite, since a
# split may have rows that see no key of it, and a power of two, so that its product with the scale
# is exact, fused or not: such a row gives all keys a weight of 1.
MASKED_SCORE = tl.constexpr(-(2.0**100))


@triton.jit
def _find(starts_ptr, sequences, tile, TOKENS: tl.constexpr):
    """The sequence of tile number `tile`, or `sequences` if no sequence has it, and the tile's
    index in its sequence. A sequence's last tiles come first: they see the longest contexts."""
    sequence = 0
    passed = 0
    counted = 0
    found = 0
    for first in range(0, sequences, 32):
        rows = first + tl.arange(0, 32)
        present = rows < sequences
        starts = tl.load(starts_ptr + rows, mask=present, other=0)
        ends = tl.load(starts_ptr + rows + 1, mask=present, other=0)
        tiles = tl.cdiv(ends - starts, TOKENS)
        before = counted + tl.cumsum(tiles, 0) - tiles
        passing = present & (before + tiles <= tile)
        sequence += tl.sum(passing.to(tl.int32), 0)
        passed += tl.sum(tl.where(passing, tiles, 0), 0)
        found += tl.sum(tl.where((before <= tile) & (tile < before + tiles), tiles, 0), 0)
        counted += tl.sum(tiles, 0)
    return sequence, found - 1 - (tile - passed)


@triton.jit
def _over_keys(
    q,
    row_max,
    row_sum,
    acc,
    start,
    end,
    visible,  # [ROWS], how many keys each row may see
    keys,  # descriptors as in `_prefill`, or pointers where DESCRIPTORS is off
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
    """Goes on with the online softmax over keys [start, end); `start` is a multiple of KEYS."""
    dims = tl.arange(0, DIM)
    # Loaded one tile ahead, so that the tile itself can be fetched ahead of its use.
    block = tl.load(table + tl.minimum(start, end - 1) // BLOCK)
    # Masked keys are few. With three stages for them, two programs would not fit on a processor.
    for first in tl.range(start, end, KEYS, num_stages=2 if MASKED else None):
        positions = first + tl.arange(0, KEYS)
        if BLOCK % KEYS == 0:
            kv_index = block * BLOCK + first % BLOCK
            block = tl.load(table + tl.minimum(first + KEYS, end - 1) // BLOCK)
            kv_indices = kv_index.to(tl.int64) + tl.arange(0, KEYS)
        else:
            blocks = tl.load(table + positions // BLOCK, mask=positions < end, other=0)
            kv_indices = blocks.to(tl.int64) * BLOCK + positions % BLOCK
        offsets = (kv_indices * HEADS + head)[:, None] * DIM + dims[None, :]
        inside = (positions < end)[:, None]
        if DESCRIPTORS:
            k = keys.load([kv_index, head * DIM])
        else:
            k = tl.load(keys + offsets, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            scores = tl.where(positions[None, :] < visible[:, None], scores, MASKED_SCORE)
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        if DESCRIPTORS:
            v = values.load([kv_index, head * DIM])
        else:
            v = tl.load(values + offsets, mask=inside, other=0.0)
        acc = acc * rescale[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        row_max = new_max
    return row_max, row_sum, acc


@triton.jit(
    do_not_specialize=["table_stride", "sequences"],
    do_not_specialize_on_alignment=["tables_ptr", "starts_ptr", "lengths_ptr"],
)
def _prefill(
    q_ptr,  # [tokens, HEADS * GROUP, DIM]
    k_ptr,  # [blocks, BLOCK, HEADS, DIM]
    v_ptr,
    keys,  # the same as k_ptr, or where DESCRIPTORS a tensor descriptor, see _described
    values,
    out_ptr,  # as q
    split_out_ptr,  # see SplitResults; used where SPLIT
    lse_ptr,
    tables_ptr,
    starts_ptr,
    lengths_ptr,
    table_stride,
    sequences,
    scale,  # head_dim ** -0.5 * log2(e), since exponentials are powers of two
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,  # the fewest keys of a split
    OVERLAP: tl.constexpr,
):
    launch_next(OVERLAP)
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
    num_queries = tl.load(starts_ptr + sequence + 1) - start
    before = tl.load(lengths_ptr + sequence) - num_queries
    first_query = own_tile * TOKENS
    end = before + tl.minimum(first_query + TOKENS, num_queries)
    split_keys = tl.cdiv(tl.maximum(tl.cdiv(end, splits), MIN_SPLIT), KEYS) * KEYS
    needed_splits = tl.cdiv(end, split_keys)
    first_key = split * split_keys

    tokens = first_query + tl.arange(0, ROWS) // GROUP
    present = (tokens < num_queries) & (tl.arange(0, ROWS) < TOKENS * GROUP)
    group_head = tl.arange(0, ROWS) % GROUP
    rows = (start + tokens).to(tl.int64) * (HEADS * GROUP) + head * GROUP + group_head
    if SPLIT:
        used = tl.where(needed_splits > 1, needed_splits, 0)
        unused = present & (tokens < tl.where(split < used, 0, num_queries))
        tl.store(lse_ptr + rows * splits + split, float("-inf"), mask=unused)
    if split >= needed_splits:
        return
    end = tl.minimum(end, first_key + split_keys)
    dims = tl.arange(0, DIM)
    offsets = rows[:, None] * DIM + dims[None, :]
    q = tl.load(q_ptr + offsets, mask=present[:, None], other=0.0)

    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    table = tables_ptr + sequence.to(tl.int64) * table_stride
    visible = before + tokens + 1
    unmasked_end = tl.minimum((before + first_query + 1) // KEYS * KEYS, end)
    unmasked_end = tl.maximum(unmasked_end // KEYS * KEYS, first_key)
    row_max, row_sum, acc = _over_keys(
        q, row_max, row_sum, acc, first_key, unmasked_end, visible, keys, values, table, head,
        scale, False, HEADS, DIM, BLOCK, KEYS, DESCRIPTORS,
    )  # fmt: skip
    row_max, row_sum, acc = _over_keys(
        q, row_max, row_sum, acc, unmasked_end, end, visible, k_ptr, v_ptr, table, head,
        scale, True, HEADS, DIM, BLOCK, KEYS, False,
    )  # fmt: skip
    acc = acc / row_sum[:, None]

    if needed_splits == 1:
        tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=present[:, None])
    elif SPLIT:
        tl.store(lse_ptr + rows * splits + split, row_max + tl.log2(row_sum), mask=present)
        split_offsets = (rows * splits + split)[:, None] * DIM + dims[None, :]
        tl.store(split_out_ptr + split_offsets, acc, mask=present[:, None])
