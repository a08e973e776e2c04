"""The sum of many rows over peer memory, with the residual and the norm, two-shot.

Row t belongs to rank t % ranks, its owner. The ranks send their parts of a row to the owner, who
adds them up and sends the normalized row to all ranks. A program exchanges a group of rows, one of
each owner, and waits only for the programs of the same index on the other ranks. All ranks start
their programs in order, so none of these waits for a processor.

Only data is sent, in words of 32 bits, and nothing needs a fence: a word that is not 0 has come.
A 0 is sent as the float -0.0, or as two values of 16 bits of which the higher is -0.0. Who has read
a word sets it to 0 again.

So a word must be 0 again before the next one is sent to its address:

- Two buffers of parts are used in turn. A rank that sends a part in exchange n + 2 has received a
  row in exchange n + 1, whose owner had parts of all ranks. A rank sends these when its exchange n
  is complete, with all that it set to 0.
- One buffer of normalized rows is enough. An owner sends a row when it has parts of all ranks, who
  sent them when their previous exchange was complete.

Exchanges are counted on the device for each program: a CUDA graph may be replayed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.collectives.exchange import add_up, finish, floats, receive, scaled
from nanovllm.kernels.collectives.peers import DTYPES, Watch, values
from nanovllm.kernels.layers.ops import Norm
from nanovllm.kernels.overlap import await_previous, launch_next, overlapped

# Words of a row for each thread: 16 bytes are read and written at once.
PER_THREAD = 4


class TwoShot:
    """Exchanges rows of one width among the ranks, see the module. Its arguments and its rules are
    those of `PeerRows`; `addresses` are multiples of 16 bytes."""

    def __init__(self, addresses: Tensor, rank: int, width: int, rows: int, watch: Watch) -> None:
        self.rows = rows
        self.width = width
        self._ranks = len(addresses)
        self._rank = rank
        self._groups = triton.cdiv(rows, self._ranks)
        numbers = torch.zeros(self._groups, dtype=torch.int32, device=addresses.device)
        self._state = (addresses, numbers, *watch)

    @staticmethod
    def num_words(ranks: int, width: int, rows: int) -> int:
        """Words of 64 bits that each rank needs."""
        groups = -(-rows // ranks)
        return -(-3 * groups * ranks * width // 2)

    def fits(self, x: Tensor) -> bool:
        return len(x) <= self.rows and x.shape[1] * x.element_size() == 4 * self.width

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        """As `reference.add_rms_norm`, where x [T, hidden] is this rank's part.

        Args:
            residual: only the rows whose owner this rank is are read.

        Returns:
            The normalized stream, and the stream. Of the stream only the rows whose owner this rank
            is are written.
        """
        total, normed = torch.empty_like(x), torch.empty_like(x)
        padded = triton.next_power_of_2(self.width)
        _add_rms_norm[(triton.cdiv(len(x), self._ranks),)](
            values(x),
            values(x if residual is None else residual),
            values(norm.weight),
            values(normed),
            values(total),
            *self._state,
            self._rank,
            self._groups,
            len(x),
            norm.eps,
            ADD=residual is not None,
            DTYPE=DTYPES[x.dtype],
            SIZE=x.shape[1],
            WIDTH=self.width,
            PADDED_WIDTH=padded,
            RANKS=self._ranks,
            PADDED_RANKS=triton.next_power_of_2(self._ranks),
            TIMED=x.is_cuda,
            num_warps=min(max(padded // (32 * PER_THREAD), 1), 16),
            **overlapped(),
        )
        return normed, total


@triton.jit(do_not_specialize=["rank", "groups", "rows"])
def _add_rms_norm(
    x_ptr,  # int32 [rows, WIDTH]: one float32, or two values of 16 bits
    residual_ptr,
    weight_ptr,  # int32 [WIDTH]
    normed_ptr,
    total_ptr,
    addresses_ptr,  # int64 [RANKS], of int32 [3 * groups, RANKS, WIDTH]
    numbers_ptr,  # int32 [groups]
    bound_ptr,
    given_up_ptr,
    told_ptr,
    rank,
    groups,
    rows,
    eps,
    ADD: tl.constexpr,
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    PADDED_RANKS: tl.constexpr,
    TIMED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    launch_next(OVERLAP)
    group = tl.program_id(0)
    columns = tl.arange(0, PADDED_WIDTH)
    within = columns < WIDTH
    ranks = tl.arange(0, PADDED_RANKS)
    memory = _words(tl.load(addresses_ptr + ranks, mask=ranks < RANKS, other=0))
    own_memory = _words(tl.load(addresses_ptr + rank))
    weight = tl.load(weight_ptr + columns, mask=within, other=0)
    await_previous(OVERLAP)
    number = tl.load(numbers_ptr + group) + 1
    # Of the rows of this program, and of the parts of the row that this rank owns.
    offsets = (group * RANKS + ranks)[:, None] * WIDTH + columns[None, :]
    present = (group * RANKS + ranks < rows) & (ranks < RANKS)
    present = present[:, None] & within[None, :]
    x = tl.load(x_ptr + offsets, mask=present, other=0)
    parts = ((1 + (number & 1)) * groups + group) * RANKS
    sent = memory[:, None] + ((parts + rank) * WIDTH + columns)[None, :]
    tl.store(sent, _marked(x), mask=present)

    row = group * RANKS + rank
    if row < rows:
        own_offsets = row * WIDTH + columns
        residual = weight
        if ADD:
            residual = tl.load(residual_ptr + own_offsets, mask=within, other=0)
        of_all = (ranks < RANKS)[:, None] & within[None, :]
        from_all = own_memory + ((parts + ranks)[:, None] * WIDTH + columns[None, :])
        received = receive(from_all, of_all, number, bound_ptr, given_up_ptr, told_ptr, TIMED)
        tl.store(from_all, tl.zeros_like(received), mask=of_all)
        total = add_up(received, residual, ADD, DTYPE)
        tl.store(total_ptr + own_offsets, total, mask=within)
        low, high = floats(total, DTYPE)
        inverse = tl.rsqrt(tl.sum(low * low + high * high, 0) / SIZE + eps)
        normed = scaled(low, high, inverse, weight, DTYPE)
        to_all = memory[:, None] + own_offsets[None, :]
        tl.store(to_all, tl.broadcast_to(_marked(normed)[None, :], to_all.shape), mask=of_all)

    from_owners = own_memory + offsets
    normed = receive(from_owners, present, number, bound_ptr, given_up_ptr, told_ptr, TIMED)
    tl.store(from_owners, tl.zeros_like(normed), mask=present)
    tl.store(normed_ptr + offsets, normed, mask=present)
    finish(numbers_ptr + group, number)


@triton.jit
def _words(addresses):
    return tl.multiple_of(addresses.to(tl.pointer_type(tl.int32)), 16)


@triton.jit
def _marked(words):
    """These words, with -0.0 in place of 0."""
    return tl.where(words == 0, -(2**31), words)
