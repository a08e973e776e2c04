"""How the Triton attention kernels cut their work: tile sizes, warps, and splits of the context.

A program takes a tile of query rows and one split of the context. Few programs leave a GPU's
processors idle, so contexts are split where there are few tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nanovllm.kernels.attention.interface import AttentionMetadata

MAX_PREFILL_SPLITS = 16
# A split has at least this many keys: combining a shorter one costs more than it saves.
MIN_SPLIT_KEYS = 512
# Shared memory in bytes of two programs with three pipeline stages each.
THREE_STAGES_BYTES = 228 << 10


class Gpu(NamedTuple):
    """The properties of a GPU that decide how work is cut.

    Attributes:
        processors: number of streaming multiprocessors (SMs).
        descriptors: whether it can fetch tiles by tensor descriptors (Hopper and later).
        shared_memory: bytes for each processor.
    """

    processors: int = 1
    descriptors: bool = True
    shared_memory: int = 228 << 10

    @classmethod
    def current(cls) -> Gpu:
        """The current CUDA device. Without CUDA the defaults, for Triton's interpreter."""
        if not torch.cuda.is_available():
            return cls()
        properties = torch.cuda.get_device_properties()
        return cls(
            properties.multi_processor_count,
            properties.major >= 9,
            properties.shared_memory_per_multiprocessor,
        )


class DecodeTuning(NamedTuple):
    """How decode attention is cut.

    Attributes:
        tile: keys that a program takes at a time.
        programs_per_processor: contexts are split until there are this many programs.
    """

    tile: int = 64
    warps: int = 4
    stages: int = 2
    programs_per_processor: int = 4


class PrefillTuning(NamedTuple):
    """How prefill attention is cut.

    Attributes:
        rows: rows of a tile, which are query tokens times query heads of one key/value head.
        keys: keys that a program takes at a time.
        programs: programs that run on a processor at the same time.
        descriptors: whether to fetch keys and values by tensor descriptors, where the GPU has them
            and a block is a multiple of `keys`.
    """

    rows: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 3
    programs: int = 2
    descriptors: bool = True


def choose_prefill_tuning(head_dim: int, dtype: torch.dtype, gpu: Gpu) -> PrefillTuning:
    """The fastest on an H200 (`benchmarks.attention`) for 16-bit dtypes and head_dim up to 128.

    A GPU with less shared memory gets what fits into 99 KB, which all have since Ampere.
    """
    if dtype.itemsize > 2:
        # Float32 does not run on tensor cores, and takes registers instead.
        if head_dim <= 128:
            return PrefillTuning(32, 64, warps=8, stages=2, programs=1, descriptors=False)
        return PrefillTuning(16, 16, stages=2, programs=1, descriptors=False)
    if head_dim > 128:
        return PrefillTuning(64, 32, stages=2, programs=1)
    if gpu.shared_memory < THREE_STAGES_BYTES:
        return PrefillTuning(stages=2, programs=1)
    return PrefillTuning()


def max_prefill_tiles(metadata: AttentionMetadata, num_tokens: int, tile_tokens: int) -> int:
    """An upper bound of the number of tiles of `tile_tokens` query tokens each, no tile of which
    has tokens of two sequences.

    Args:
        num_tokens: query tokens of all sequences together.
    """
    by_sequence = int((-(-metadata.query_lens // tile_tokens)).sum())
    by_total = (num_tokens + len(metadata.query_lens) * (tile_tokens - 1)) // tile_tokens
    return max(1, min(by_sequence, by_total))


def choose_prefill_splits(programs: int, at_once: int, max_keys: int) -> int:
    """How many splits a context gets.

    Args:
        programs: number of programs without splits.
        at_once: how many programs the GPU runs at the same time.
        max_keys: keys of the longest context.
    """
    # Splits cost memory: all programs together run in at most two turns.
    limit = max(1, min(MAX_PREFILL_SPLITS, max_keys // MIN_SPLIT_KEYS, 2 * at_once // programs))

    def cost(splits: int) -> float:
        # Turns, each as long as a split, and what starting and combining a split costs.
        return -(-programs * splits // at_once) / splits + splits / 200

    return min(range(1, limit + 1), key=cost)
