"""Collectives of a few rows over memory that the ranks of one machine write for one another.

NCCL takes 7 to 15 µs for a small all-reduce, and a decode step has 57 to 73 of them. Here a rank
writes its rows straight to the other ranks' memory, and each rank adds up what has arrived in its
own: one way over NVLink, and no barrier. In the same kernel the sum is added to the residual stream
and normalized. Every rank adds in the order of the ranks, so all ranks compute the same bits.

A program exchanges a segment of one row: a single program could not read a long row fast enough.
For the norm the segments of a row meet once more, over the rank's own memory. The programs that a
program waits for start before or next to it, on every rank, so none of them waits for a processor.

Every rank gets all parts of a row, one-shot. `two_shot` sends less, for more rows.

A rank waits for words of others. If they do not come within the bound, the rank goes on with
whatever is there, tells so in `Watch`, and waits for nothing any more. Nothing faults.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.collectives import exchange
from nanovllm.kernels.layers.ops import Norm
from nanovllm.kernels.overlap import overlapped

WORD = torch.int64
# The most words of a row for each program, and for each of its threads.
SEGMENT = 512
PER_THREAD = 4


class Watch(NamedTuple):
    """How long to wait, and whether that was in vain.

    Attributes:
        bound: int64 [1] on the device, in ns; on a CPU, in Triton's interpreter, in looks.
        given_up: int32 [1] on the device, not 0 once this rank has waited in vain.
        told: the same on the host, where the device can write it.
    """

    bound: Tensor
    given_up: Tensor
    told: Tensor

    @classmethod
    def on(cls, device: torch.device) -> Watch:
        told = torch.zeros(1, dtype=torch.int32)
        return cls(
            torch.full((1,), torch.iinfo(torch.int64).max, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            told.pin_memory() if device.type == "cuda" else told,
        )


class PeerRows:
    """Exchanges rows of one width among the ranks.

    All ranks make the same calls in the same order with the same shapes, on one stream.

    Args:
        addresses: int64 [ranks] on the device: where `num_words` zeros of each rank begin, in the
            order of the ranks.
        rank: this one's index.
        width: 32-bit values of a row.
        rows: the most that a call may have.
    """

    def __init__(self, addresses: Tensor, rank: int, width: int, rows: int, watch: Watch) -> None:
        self.rows = rows
        self.width = width
        self._ranks = len(addresses)
        self._rank = rank
        self._segment = min(SEGMENT, triton.next_power_of_2(width))
        self._segments = triton.cdiv(width, self._segment)
        # Of each segment of each row, and the words by which a row's segments meet.
        numbers = torch.zeros(rows, self._segments, dtype=torch.int32, device=addresses.device)
        meeting = torch.zeros(2, rows, self._segments, dtype=WORD, device=addresses.device)
        self._state = (addresses, numbers, meeting, *watch)

    @staticmethod
    def num_words(ranks: int, width: int, rows: int) -> int:
        """Words of 64 bits that each rank needs."""
        return 2 * rows * ranks * width

    def fits(self, x: Tensor) -> bool:
        return len(x) <= self.rows and x.shape[1] * x.element_size() == 4 * self.width

    def add(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The sum of the ranks' parts x [T, hidden] and of the residual, see
        `reference.add_rms_norm`."""
        return self.add_rms_norm(x, residual, None)[1]

    def add_rms_norm(
        self, x: Tensor, residual: Tensor | None, norm: Norm | None
    ) -> tuple[Tensor, Tensor]:
        """As `reference.add_rms_norm`, where x [T, hidden] is this rank's part. Without a norm the
        normalized stream is the stream."""
        total = torch.empty_like(x)
        normed = total if norm is None else torch.empty_like(x)
        exchange.add_rms_norm[(self._segments, len(x))](
            values(x),
            values(x if residual is None else residual),
            values(x if norm is None else norm.weight),
            values(normed),
            values(total),
            *self._state,
            self._rank,
            self.rows,
            0.0 if norm is None else norm.eps,
            ADD=residual is not None,
            NORM=norm is not None,
            DTYPE=DTYPES[x.dtype],
            SIZE=x.shape[1],
            **self._options(),
        )
        return normed, total

    def all_gather(self, x: Tensor) -> Tensor:
        """As `reference.all_gather`, where x [rows, columns] is this rank's part."""
        out = x.new_empty(len(x), self._ranks * x.shape[1])
        exchange.all_gather[(self._segments, len(x))](
            values(x),
            values(out),
            *self._state,
            self._rank,
            self.rows,
            **self._options(),
        )
        return out

    def _options(self) -> dict[str, int | bool]:
        return {
            "WIDTH": self.width,
            "SEGMENT": self._segment,
            "SEGMENTS": self._segments,
            "PADDED_SEGMENTS": triton.next_power_of_2(self._segments),
            "RANKS": self._ranks,
            "PADDED_RANKS": triton.next_power_of_2(self._ranks),
            "TIMED": self._state[0].is_cuda,
            "num_warps": max(self._segment // (32 * PER_THREAD), 1),
            **overlapped(),
        }


DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def values(x: Tensor) -> Tensor:
    return x.view(torch.int32)
