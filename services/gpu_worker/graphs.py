"""CUDA graphs of whole steps: from the slots or columns that the host sends to sampled tokens.

A graph is captured for a fixed number of rows and tokens. A smaller step is padded with rows of the
padding slot. All graphs share one pool of memory, since only one runs at a time. So the tensors
that a replay returns hold until the next replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm.services.gpu_worker.slots import Batch, Int32s, Layout, columns
from nanovllm.services.gpu_worker.steps import StepOutput

# Mixed steps have room for FEWEST_CHUNK_TOKENS tokens of chunks, or for a multiple of
# CHUNK_TOKENS_APART. Beyond DOUBLING_FROM tokens, each size is twice the one before: each runs once
# at start, and large ones take long.
FEWEST_CHUNK_TOKENS = 128
CHUNK_TOKENS_APART = 256
DOUBLING_FROM = 2048
# Mixed steps have room for these numbers of decodes, and for as many as there are slots.
DECODES_BESIDE_CHUNKS = (8, 64, 128, 256, 384)
# Mixed steps have room for one chunk for each TOKENS_PER_CHUNK tokens, within these bounds. A step
# with more chunks is launched kernel by kernel: the CPU launches it for longer than a small model
# computes it.
TOKENS_PER_CHUNK = 8
FEWEST_CHUNKS = 32
MOST_CHUNKS = 128
# How many rows that need whole logits a rank draws in a replay. With more, launching the kernels
# takes less than the kernels do.
WHOLE_SHARES = (1, 2, 4, 8, 16)
# As many of rows whose logits are processed: their draw is more kernels, some of them small.
PROCESSED_SHARES = (1, 4, 16, 64, 256)
# How many rows with a grammar alone are drawn in a replay. All ranks draw all of them.
MASKED_SIZES = (1, 4, 16, 64, 128, 256)


class Sizes(NamedTuple):
    """The steps to capture: numbers of decodes, and layouts of mixed steps, both ascending."""

    decodes: Sequence[int]
    mixed: Sequence[Layout]

    @property
    def total(self) -> int:
        return len(self.decodes) + len(self.mixed)


T = TypeVar("T")
Replay = Callable[[], T]


class Capture(Protocol):
    """Turns what enqueues kernels into a function that enqueues them again."""

    def __call__(self, enqueue: Callable[[], T]) -> Replay[T]: ...


class StepGraphs:
    """Captured steps.

    Args:
        decode: enqueues a step in which all slots int64 [n] given decode.
        mixed: enqueues a step with prefill chunks. Takes `slots.columns` on the device, and their
            layout.
        padding_slot: the slot of the rows that a graph has too many.
        capture: turns a step into a function that replays it.
        progress: takes the number of graphs captured, and the number in total.
    """

    def __init__(
        self,
        decode: Callable[[Tensor], StepOutput],
        mixed: Callable[[Tensor, Layout], StepOutput],
        sizes: Sizes,
        padding_slot: int,
        device: torch.device,
        capture: Capture,
        progress: Callable[[int, int], None],
    ) -> None:
        self._decode_sizes = np.array(sizes.decodes)
        self._padding_slot = padding_slot
        most = sizes.decodes[-1]
        self._slots = torch.full((most,), padding_slot, dtype=torch.int64, device=device)
        self._host_slots = np.full(most, padding_slot, dtype=np.int64)
        self._columns: dict[Layout, Tensor] = {}
        for layout in sizes.mixed:
            self._columns[layout] = torch.from_numpy(columns(_NOTHING, layout, padding_slot)).to(
                device
            )
        self._replays: dict[int | Layout, Replay[StepOutput]] = {}
        progress(0, sizes.total)
        # The largest step needs the most of the memory that all graphs share.
        largest_first: list[int | Layout] = [*reversed(sizes.mixed), *reversed(sizes.decodes)]
        for size in largest_first:
            step = (
                partial(mixed, self._columns[size], size)
                if isinstance(size, Layout)
                else partial(decode, self._slots[:size])
            )
            self._replays[size] = capture(step)
            progress(len(self._replays), sizes.total)

    def replay(self, batch: Batch) -> StepOutput | None:
        """Enqueues the step, if a graph has room for it. Otherwise returns None."""
        if not len(batch.chunk_slots):
            return self._replay_decodes(batch.decode_slots)
        layout = self._room_for(Layout.of(batch))
        if layout is None:
            return None
        self._columns[layout].copy_(
            pinned(columns(batch, layout, self._padding_slot)), non_blocking=True
        )
        return first_rows(self._replays[layout](), len(batch.sampling_rows))

    def _replay_decodes(self, slots: Int32s) -> StepOutput:
        n = len(slots)
        size = int(self._decode_sizes[np.searchsorted(self._decode_sizes, n)])
        if (
            not np.array_equal(self._host_slots[:n], slots)
            or (self._host_slots[n:size] != self._padding_slot).any()
        ):
            self._host_slots[:n] = slots
            self._host_slots[n:size] = self._padding_slot
            self._slots[:size].copy_(pinned(self._host_slots[:size]), non_blocking=True)
        return first_rows(self._replays[size](), n)

    def _room_for(self, needed: Layout) -> Layout | None:
        """The first layout that has room: the smallest one."""
        return next(
            (
                layout
                for layout in self._columns
                if all(have >= need for have, need in zip(layout, needed, strict=True))
            ),
            None,
        )


class DrawGraph(NamedTuple):
    """A captured draw of a step's rows, see `Steps.draw_whole`, `draw_masked`, `draw_processed`.

    Attributes:
        share: how many rows each rank draws.
        drawn: int64 [2, n] on the device, which a replay reads.
    """

    share: int
    drawn: Tensor
    replay: Replay[None]


def capture_draws(
    draw: Callable[[Tensor], None],
    shares: Sequence[int],
    most: int,
    make_drawn: Callable[[int], Tensor],
    capture: Capture,
) -> list[DrawGraph]:
    """Draws of few rows, the fewest first.

    Args:
        draw: enqueues the draw of the rows and slots int64 [2, n] given.
        shares: how many rows each rank draws, `most` at most.
        make_drawn: makes rows and slots for a share, of padding.
    """
    graphs = []
    for share in sorted({min(share, most) for share in shares}):
        drawn = make_drawn(share)
        graphs.append(DrawGraph(share, drawn, capture(partial(draw, drawn))))
    return graphs


class CudaCapture:
    """Captures as CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, enqueue: Callable[[], T]) -> Replay[T]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            enqueue()  # kernels are compiled here, which a capture does not allow
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(self._pool)
            output = enqueue()
            graph.capture_end()
        current.wait_stream(self._stream)

        def replay() -> T:
            graph.replay()
            return output

        return replay


def graph_sizes(max_num_seqs: int, max_prefill_tokens: int) -> Sizes:
    """The steps to capture.

    A padding row costs a few µs of a step, which at 64 rows takes thousands of µs. A graph costs
    some hundredths of a second at start. So there are few graphs, and the larger, the fewer. Mixed
    steps have more sizes: of some hundreds of tokens, each padding token takes a large model time.
    """
    decodes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs, 32)]
    decodes = [size for size in decodes if size < max_num_seqs] + [max_num_seqs]
    beside = [*(rows for rows in DECODES_BESIDE_CHUNKS if rows < max_num_seqs), max_num_seqs]
    mixed: list[Layout] = []
    for tokens in _chunk_tokens(max_prefill_tokens):
        # In one step a slot decodes, or has one chunk.
        chunks = min(max(FEWEST_CHUNKS, tokens // TOKENS_PER_CHUNK), MOST_CHUNKS, max_num_seqs)
        mixed += [Layout(rows, chunks, tokens, min(rows + chunks, max_num_seqs)) for rows in beside]
    return Sizes(decodes, mixed)


def _chunk_tokens(most: int) -> list[int]:
    """How many tokens of chunks mixed steps have room for, up to `most`."""
    sizes = [FEWEST_CHUNK_TOKENS, *range(CHUNK_TOKENS_APART, DOUBLING_FROM, CHUNK_TOKENS_APART)]
    tokens = DOUBLING_FROM
    while tokens < most:
        sizes.append(tokens)
        tokens *= 2
    return [*(size for size in sizes if size < most), most]


def first_rows(output: StepOutput, rows: int) -> StepOutput:
    return StepOutput(output.token_ids[:rows], output.logits[:rows], output.slots[:rows])


def pinned(array: NDArray[np.int64]) -> Tensor:
    """A copy of `array` on the host, from which nothing waits for the copy to the device. Torch's
    cache keeps the pinned memory until that copy is done."""
    host = torch.from_numpy(array)
    return host.pin_memory() if torch.cuda.is_available() else host.clone()


_NO_ROWS = np.empty(0, dtype=np.int32)
_NOTHING = Batch._make([[], [], _NO_ROWS.reshape(0, 3), *[_NO_ROWS] * 15, []])
