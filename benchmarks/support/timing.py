"""Timing and checking kernels on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

# Relative, ||out - expected|| / ||expected||.
TOLERANCE = 1e-2
# What copies of the same data take together, lest it is in L2; that of an H200 has 50 MB.
ROTATED_BYTES = 160 << 20
CALLS, REPLAYS = 24, 15


def seconds_per_call(call: Callable[[int], object]) -> float:
    """Median over replays of a graph of `CALLS` calls, which get 0, 1, ... to choose copies by."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    for number in range(CALLS):
        call(number)
    graph.capture_end()
    times = []
    for _ in range(REPLAYS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / CALLS)
    return float(statistics.median(times[2:]))


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def is_wrong(found: Tensor, expected: Tensor) -> bool:
    found, expected = found.float(), expected.float()
    # Not greater, so that NaN is wrong.
    return not bool((found - expected).norm() <= TOLERANCE * expected.norm())
