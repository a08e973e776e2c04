"""How a step, and a draw after it, read and advance the slots, in plain torch.

`FusedSlotOps` in `kernels.slots.fused` does the same on a GPU in one kernel each. A dozen small
copies would take a thirtieth of the step of one sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.sampling.reference import NOT_FINITE, SamplingTensors, filters
from nanovllm.token_sets import WORD_BITS

# In `DrawInputs.positions`.
SETTLED = -1


class SlotState(NamedTuple):
    """The device state of s slots. The last one is the padding slot, which takes a captured step's
    unused rows: it always looks like a sequence of one token.

    Attributes:
        block_tables: int32 [s, max_blocks]; entries beyond a sequence's blocks name any block.
        num_tokens: int64 [s], length of each sequence, sampled tokens included.
        last_tokens: int64 [s], the token sampled last.
        sampling: tensors [s].
    """

    block_tables: Tensor
    num_tokens: Tensor
    last_tokens: Tensor
    sampling: SamplingTensors


class DecodeInputs(NamedTuple):
    """The inputs of n decodes.

    Attributes:
        token_ids, positions: int64 [n], the token to compute and its index in its sequence.
        kv_indices: int64 [n], see `store_kv`.
        context_lens: int32 [n], the sequence's length.
        block_tables: int32 [n, max_blocks].
        next_positions: int64 [n], the index that the sampled token will have.
        sampling: tensors [n].
    """

    token_ids: Tensor
    positions: Tensor
    kv_indices: Tensor
    context_lens: Tensor
    block_tables: Tensor
    next_positions: Tensor
    sampling: SamplingTensors


class DrawInputs(NamedTuple):
    """The inputs of n rows that are drawn again.

    Attributes:
        positions: int64 [n], the index in its sequence that each slot's token will have; SETTLED
            for a row that keeps the token.
        sampling: tensors [n].
    """

    positions: Tensor
    sampling: SamplingTensors


class SlotOps:
    """The reference."""

    def gather(self, state: SlotState, slots: Tensor, block_size: int) -> DecodeInputs:
        """The inputs of a decode of `slots` int64 [n]."""
        lengths = state.num_tokens[slots]
        positions = lengths - 1
        tables = state.block_tables.index_select(0, slots)
        blocks = tables.gather(1, (positions // block_size)[:, None]).squeeze(1).long()
        return DecodeInputs(
            token_ids=state.last_tokens[slots],
            positions=positions,
            kv_indices=blocks * block_size + positions % block_size,
            context_lens=lengths.int(),
            block_tables=tables,
            next_positions=lengths,
            sampling=SamplingTensors(*(held[slots] for held in state.sampling)),
        )

    def gather_draw(
        self, state: SlotState, drawn: Tensor, token_ids: Tensor, masks: Tensor | None = None
    ) -> DrawInputs:
        """The inputs of rows that are drawn again.

        With masks some rows are settled. Without filters a token has the best score + noise, or the
        best logit, of all tokens. If the mask holds this token, it is the best of those in the
        mask, too. Nor is the padding slot drawn.

        Args:
            drawn: int64 [2, n], rows and slots.
            token_ids: int64, the rows' tokens.
            masks: int32 [n, words], sets as `nanovllm.token_sets` has them; None if the rows are
                drawn without.
        """
        rows, slots = drawn
        positions = state.num_tokens[slots]
        params = SamplingTensors(*(held[slots] for held in state.sampling))
        if masks is not None:
            tokens = token_ids[rows]
            known = tokens.clamp_min(0)
            words = masks.gather(1, (known // WORD_BITS)[:, None])[:, 0]
            allowed = (words >> (known % WORD_BITS).int()) & 1 != 0
            settled = (tokens >= 0) & allowed & ~filters(params)
            settled |= slots == len(state.num_tokens) - 1
            positions.masked_fill_(settled, SETTLED)
        return DrawInputs(positions, params)

    def replace(
        self, rows: Tensor, positions: Tensor, token_ids: Tensor, out: Tensor, none_left: int
    ) -> None:
        """Rows that are not settled get the tokens drawn.

        Args:
            rows: int64 [n]. A row may occur more than once, then always with the same token.
            positions: int64 [n], of `gather_draw`.
            token_ids: int64 [n].
            out: int64, the rows' tokens, which are overwritten.
            none_left: in place of NOT_FINITE, where the row's former token is another one.
        """
        anew = (positions != SETTLED).nonzero()[:, 0]
        rows, token_ids = rows[anew], token_ids[anew]
        none = (token_ids == NOT_FINITE) & (out[rows] != NOT_FINITE)
        out[rows] = token_ids.masked_fill(none, none_left)

    def advance(self, state: SlotState, slots: Tensor, token_ids: Tensor) -> Tensor:
        """Ends a step: appends a token to each slot. A negative token says that there is none. Then
        token 0 is appended, which the next step computes before the host knows.

        Args:
            slots: int64 [n], different ones.
            token_ids: int64 [n].

        Returns:
            The tokens as int32 [n] on the host, in memory of their own, pinned for a GPU: complete
            once the device has come so far.
        """
        state.last_tokens[slots] = token_ids.clamp_min(0)
        state.num_tokens[slots] += 1
        return token_ids.to("cpu", torch.int32, non_blocking=True, copy=True)


def choose_slot_ops(device: torch.device) -> SlotOps:
    """The fastest operations that run on `device`."""
    if device.type != "cuda":
        return SlotOps()
    # Imported where it is chosen: a CPU may have no Triton, and importing it is slow.
    from nanovllm.kernels.slots.fused import FusedSlotOps

    return FusedSlotOps()
