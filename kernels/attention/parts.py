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

# A power of two. The kernel is one for all numbers of parts, since each has to be compiled.
MOST_PARTS = 32


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
        _join[(tokens * heads,)](*self, out, parts, PARTS=MOST_PARTS, DIM=dim, **overlapped())


@triton.jit(do_not_specialize=["parts"])
def _join(
    mixed_ptr,  # [rows, parts, DIM]
    logs_ptr,  # [rows, parts]
    out_ptr,  # [rows, DIM]
    parts,
    PARTS: tl.constexpr,
    DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    await_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    dims = tl.arange(0, DIM)
    logs = tl.load(logs_ptr + row * parts + part, mask=part < parts, other=float("-inf"))
    most = tl.max(logs, 0)
    if most > float("-inf"):
        shares = tl.exp2(logs - most)
        mixed = tl.load(
            mixed_ptr + (row * parts + part)[:, None] * DIM + dims[None, :],
            mask=(shares > 0)[:, None],
            other=0.0,
        )
        joined = tl.sum(mixed * shares[:, None], 0) / tl.sum(shares, 0)
        tl.store(out_ptr + row * DIM + dims, joined.to(out_ptr.dtype.element_ty))
