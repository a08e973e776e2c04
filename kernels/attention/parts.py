"""Contexts in parts: what each part comes to, and the kernel that joins them (Dao et al., 2023,
"Flash-Decoding").

A last program that joins what the others have left would save a kernel, but takes registers from
all, and waits for what they write; with `overlap`, the kernel costs less.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention.interface import AttentionShape
from nanovllm.kernels.overlap import await_previous, begin, overlapped

# Powers of two. The kernel is one for few parts and one for many, since each has to be compiled; a
# program joins `MOST_PARTS` of one row, or `FEW_PARTS` of several.
FEW_PARTS = 8
MOST_PARTS = 32
# Below the log of any part.
UNUSED = tl.constexpr(-(2.0**120))


class Parts(NamedTuple):
    """Of the contexts of some query tokens; all layers use the same.

    Attributes:
        mixed: float32 [query tokens, heads, parts, head_dim], each part's result.
        logs: float32 [query tokens, heads, parts], log2 of each part's sum of exponentials, or
            -inf for one that is not used.
    """

    mixed: Tensor
    logs: Tensor

    @classmethod
    def of(cls, tokens: int, shape: AttentionShape, parts: int, device: torch.device) -> Parts:
        size = (tokens, shape.num_heads, parts)
        return cls(
            torch.empty(*size, shape.head_dim, dtype=torch.float32, device=device),
            torch.empty(size, dtype=torch.float32, device=device),
        )

    def join(self, out: Tensor) -> None:
        """Writes to `out` [query tokens, heads, head_dim] what parts come to, where one is used."""
        tokens, heads, parts, dim = self.mixed.shape
        few = parts <= FEW_PARTS
        rows = MOST_PARTS // FEW_PARTS if few else 1
        _join[(triton.cdiv(tokens * heads, rows),)](
            *self,
            out,
            tokens * heads,
            parts,
            ROWS=rows,
            PARTS=FEW_PARTS if few else MOST_PARTS,
            DIM=dim,
            **overlapped(),
        )


@triton.jit(do_not_specialize=["rows", "parts"])
def _join(
    mixed_ptr,  # [rows, parts, DIM]
    logs_ptr,  # [rows, parts]
    out_ptr,  # [rows, DIM]
    rows,
    parts,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    await_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, PARTS)
    dims = tl.arange(0, DIM)
    places = row[:, None] * parts + part[None, :]
    there = (row < rows)[:, None] & (part < parts)[None, :]
    logs = tl.load(logs_ptr + places, mask=there, other=float("-inf"))
    # Finite, for a row may have no part that is used; among others one has a share of 1.
    most = tl.maximum(tl.max(logs, 1), UNUSED)
    shares = tl.exp2(logs - most[:, None])
    total = tl.maximum(tl.sum(shares, 1), 1.0)
    mixed = tl.load(
        mixed_ptr + places[:, :, None] * DIM + dims[None, None, :],
        mask=(shares > 0)[:, :, None],
        other=0.0,
    )
    joined = tl.sum(mixed * shares[:, :, None], 1) / total[:, None]
    tl.store(
        out_ptr + row[:, None] * DIM + dims[None, :],
        joined.to(out_ptr.dtype.element_ty),
        mask=(most > UNUSED)[:, None],
    )
