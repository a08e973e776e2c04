"""CUDA graphs of whole decode steps: from the slots that decode to their sampled tokens.

A graph is captured for a fixed number of rows. A step with fewer is padded with rows of a slot that
belongs to nobody. All graphs share one pool of memory, since only one runs at a time; so what a
replay returns holds until the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.services.gpu_worker.slots import Int32s


class Decoded(NamedTuple):
    """Of n rows: token_ids int32 [n], and the logits [n, local vocabulary] they were drawn from."""

    token_ids: Tensor
    logits: Tensor


Decode = Callable[[Tensor], Decoded]
"""A decode step of the slots int64 [n] on the device."""


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    decoded: Decoded


class DecodeGraphs:
    """Captured decode steps.

    Args:
        decode: what is captured. It may neither wait for the device nor read from it.
        sizes: numbers of rows to capture, in ascending order.
        padding: the slot that belongs to nobody.
        progress: told how many graphs are captured, of how many.
    """

    def __init__(
        self,
        decode: Decode,
        sizes: Sequence[int],
        padding: int,
        device: torch.device,
        progress: Callable[[int, int], None],
    ) -> None:
        self._sizes = np.array(sizes)
        self._padding = padding
        self._slots = torch.full((sizes[-1],), padding, dtype=torch.int64, device=device)
        self._host_slots = np.full(sizes[-1], padding, dtype=np.int64)
        self._graphs: dict[int, _Graph] = {}
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        progress(0, len(sizes))
        with torch.cuda.stream(stream):
            for done, size in enumerate(reversed(sizes), 1):
                slots = self._slots[:size]
                decode(slots)  # compiles kernels, which a capture may not
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool)
                decoded = decode(slots)
                graph.capture_end()
                self._graphs[size] = _Graph(graph, decoded)
                progress(done, len(sizes))
        torch.cuda.current_stream(device).wait_stream(stream)

    def replay(self, slots: Int32s) -> Decoded:
        """Enqueues the decode step of `slots` int32 [n], n no more than the largest size."""
        n = len(slots)
        size = int(self._sizes[np.searchsorted(self._sizes, n)])
        if (
            not np.array_equal(self._host_slots[:n], slots)
            or (self._host_slots[n:size] != self._padding).any()
        ):
            self._host_slots[:n] = slots
            self._host_slots[n:size] = self._padding
            # Pinned memory comes from torch's cache, which keeps it until the copy is done.
            pinned = torch.from_numpy(self._host_slots[:size]).pin_memory()
            self._slots[:size].copy_(pinned, non_blocking=True)
        captured = self._graphs[size]
        captured.graph.replay()
        return Decoded(captured.decoded.token_ids[:n], captured.decoded.logits[:n])


def graph_sizes(most: int) -> list[int]:
    """Numbers of rows to capture, in ascending order up to `most`.

    A row too many costs a few µs of a step, of which at 64 rows there are thousands, but a graph
    costs a tenth of a second at start. So there are few, and steps grow with the size.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most, 32)]
    return [size for size in sizes if size < most] + [most]
