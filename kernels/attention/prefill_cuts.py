"""How a prefill is cut up: into tiles of query tokens, and contexts into parts."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nanovllm.kernels.attention.device import Device
from nanovllm.kernels.attention.interface import AttentionMetadata

MAX_SPLITS = 16
# A part has at least so many keys: a shorter one is not worth joining.
SHORTEST_PART = 512
# What two programs of three stages take.
ROOM_FOR_THREE_STAGES = 228 << 10


class Tuning(NamedTuple):
    """How a prefill is cut up.

    Attributes:
        rows: query tokens times query heads of a key/value head that a program has.
        keys: tokens of the context that it takes at a time.
        programs: that a processor runs at once.
        descriptors: tiles of keys are fetched by tensor descriptors, if blocks are whole tiles.
    """

    rows: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 3
    programs: int = 2
    descriptors: bool = True


def choose_tuning(head_dim: int, dtype: torch.dtype, device: Device) -> Tuning:
    """The fastest on an H200 (`benchmarks.attention`), at 16 bits and up to 128 dimensions; with
    less shared memory, what fits into 99 KB, which all GPUs since Ampere have."""
    if dtype.itemsize > 2:
        # Products in float32 are not the tensor cores': they take registers instead.
        if head_dim <= 128:
            return Tuning(32, 64, warps=8, stages=2, programs=1, descriptors=False)
        return Tuning(16, 16, stages=2, programs=1, descriptors=False)
    if head_dim > 128:
        return Tuning(64, 32, stages=2, programs=1)
    if device.shared_memory < ROOM_FOR_THREE_STAGES:
        return Tuning(stages=2, programs=1)
    return Tuning()


def most_tiles(metadata: AttentionMetadata, rows: int, tokens: int) -> int:
    """How many tiles of `tokens` the sequences can have, whose query tokens are `rows` together."""
    each = int((-(-metadata.query_lens // tokens)).sum())
    return max(1, min(each, (rows + len(metadata.query_lens) * (tokens - 1)) // tokens))


def choose_splits(programs: int, slots: int, most_keys: int) -> int:
    """Into how many parts to split contexts of up to `most_keys`, for `programs` that each take
    one whole, where `slots` run at once.

    Each part costs what a fraction of a context does, for starting and joining it; and memory, so
    that there are no more than run in two turns.
    """
    most = max(1, min(MAX_SPLITS, most_keys // SHORTEST_PART, 2 * slots // programs))

    def cost(splits: int) -> float:
        return -(-programs * splits // slots) / splits + splits / 200

    return min(range(1, most + 1), key=cost)
