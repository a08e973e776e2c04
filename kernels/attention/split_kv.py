"""Split-KV: the partial results of a context's splits, and the kernel that combines them (Dao et
al., 2023, "Flash-Decoding").

Combining in the last attention program that finishes would save a kernel. But it takes registers
from all programs, and waits for what they write; with `overlap` a second kernel costs less.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention.interface import AttentionShape
from nanovllm.kernels.overlap import await_previous, launch_next, overlapped

# Powers of two. The combining kernel is compiled twice: for few splits, where a program combines
# several rows, and for many, where it combines one.
FEW_SPLITS = 8
MAX_SPLITS = 32
# Below the log-sum-exp of any split.
UNUSED = tl.constexpr(-(2.0**120))


class SplitResults(NamedTuple):
    """Partial results of a step's query tokens; all layers write to the same memory.

    Attributes:
        out: float32 [query tokens, heads, splits, head_dim], attention over each split alone.
        lse: float32 [query tokens, heads, splits], log2 of each split's sum of exponentials; -inf
            for an unused split.
    """

    out: Tensor
    lse: Tensor

    @classmethod
    def empty(
        cls, tokens: int, shape: AttentionShape, splits: int, device: torch.device
    ) -> SplitResults:
        size = (tokens, shape.num_heads, splits)
        return cls(
            torch.empty(*size, shape.head_dim, dtype=torch.float32, device=device),
            torch.empty(size, dtype=torch.float32, device=device),
        )

    def combine(self, out: Tensor) -> None:
        """Writes the attention over all splits to `out` [query tokens, heads, head_dim].

        Rows of which no split is used are left as they are.
        """
        tokens, heads, splits, dim = self.out.shape
        few = splits <= FEW_SPLITS
        rows = MAX_SPLITS // FEW_SPLITS if few else 1
        _combine[(triton.cdiv(tokens * heads, rows),)](
            *self,
            out,
            tokens * heads,
            splits,
            ROWS=rows,
            SPLITS=FEW_SPLITS if few else MAX_SPLITS,
            DIM=dim,
            **overlapped(),
        )


@triton.jit(do_not_specialize=["rows", "splits"])
def _combine(
    split_out_ptr,  # [rows, splits, DIM]
    lse_ptr,  # [rows, splits]
    out_ptr,  # [rows, DIM]
    rows,
    splits,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    launch_next(OVERLAP)
    await_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, SPLITS)
    dims = tl.arange(0, DIM)
    offsets = row[:, None] * splits + split[None, :]
    present = (row < rows)[:, None] & (split < splits)[None, :]
    lse = tl.load(lse_ptr + offsets, mask=present, other=float("-inf"))
    # Finite also where no split is used. Elsewhere the largest split has a weight of 1.
    row_max = tl.maximum(tl.max(lse, 1), UNUSED)
    weights = tl.exp2(lse - row_max[:, None])
    row_sum = tl.maximum(tl.sum(weights, 1), 1.0)
    split_out = tl.load(
        split_out_ptr + offsets[:, :, None] * DIM + dims[None, None, :],
        mask=(weights > 0)[:, :, None],
        other=0.0,
    )
    combined = tl.sum(split_out * weights[:, :, None], 1) / row_sum[:, None]
    tl.store(
        out_ptr + row[:, None] * DIM + dims[None, :],
        combined.to(out_ptr.dtype.element_ty),
        mask=(row_max > UNUSED)[:, None],
    )
