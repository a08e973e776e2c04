"""Logits processors in plain torch: what a request asks to be done to logits before sampling.

A CPU runs this, and the kernel is tested against it. The order is that of transformers' processors,
with the penalties of OpenAI's API between the repetition penalty and the tokens that are ruled out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.token_sets import WORD_BITS

NO_TOKEN = -1  # in `ProcessorState.beginnings` and `tail`
NO_COLUMN = -1  # in `ProcessorState.bias_columns` and `lasts`
# In `ProcessorState.seen`: the token is in the prompt. The other bits count it in the output.
IN_PROMPT = -(1 << 15)
MOST_COUNTED = (1 << 15) - 1


class ProcessorState(NamedTuple):
    """What the processors keep of s slots, for a shard of the vocabulary.

    Attributes:
        repetition, frequency, presence: float32 [s]; 1, 0 and 0 are off.
        min_length: int64 [s]; a token with a smaller index in its sequence is none of `held_off`.
        seen: int16 [s, shard], how often each token is in the output (MOST_COUNTED at most), and
            IN_PROMPT if it is in the prompt.
        allowed, held_off: int32 [s, words], sets of token ids of the whole vocabulary, see
            `nanovllm.token_sets`.
        bias_columns, bias: int32 and float32 [s, biases], distinct columns of the shard, and what
            is added to their logits. Unused entries are NO_COLUMN and 0.
        beginnings, lasts: int32 [s, bad words, t] and [s, bad words], of each bad word of several
            tokens all but its last, to the right of NO_TOKEN; and the column of its last.
            NO_COLUMN if the last is in another shard, or there is no bad word.
        tail: int32 [s, t], the last tokens of the sequence, to the right of NO_TOKEN.
    """

    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    min_length: Tensor
    seen: Tensor
    allowed: Tensor
    held_off: Tensor
    bias_columns: Tensor
    bias: Tensor
    beginnings: Tensor
    lasts: Tensor
    tail: Tensor


Mask = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
Process = Callable[[Tensor, Tensor, ProcessorState, Tensor, Tensor, int], Tensor]


def process(
    logits: Tensor,
    rows: Tensor,
    state: ProcessorState,
    slots: Tensor,
    positions: Tensor,
    first: int,
) -> Tensor:
    """Rows of logits after the processors: float32 [n, shard].

    1. The bias is added.
    2. Repetition penalty (Keskar et al., 2019, "CTRL"): of a token in prompt or output, a positive
       logit is divided by it, a negative one multiplied.
    3. Frequency and presence penalty: of a token that is c times in the output, c times the first
       is subtracted, and the second.
    4. Tokens that are not allowed, held off, or the last of a bad word whose beginning is said, get
       -inf.

    Args:
        logits: [m, shard] of any float dtype, of the tokens from `first` on.
        rows: int64 [n].
        slots: int64 [n], the rows' slots.
        positions: int64 [n], the index in its sequence that the sampled token will have.
    """
    processed = logits[rows].float()
    processed.scatter_add_(1, state.bias_columns[slots].clamp_min(0).long(), state.bias[slots])
    seen = state.seen[slots].int()
    count = seen & MOST_COUNTED
    repetition = state.repetition[slots, None]
    penalized = torch.where(processed > 0, processed / repetition, processed * repetition)
    torch.where(seen != 0, penalized, processed, out=processed)
    processed -= state.frequency[slots, None] * count
    processed -= state.presence[slots, None] * (count > 0)
    tokens = torch.arange(first, first + processed.shape[1], device=processed.device)
    early = (positions < state.min_length[slots])[:, None]
    ruled_out = ~_contains(state.allowed[slots], tokens)
    ruled_out |= early & _contains(state.held_off[slots], tokens)
    processed.masked_fill_(ruled_out, -torch.inf)
    beginnings, lasts = state.beginnings[slots], state.lasts[slots]
    said = ((beginnings == state.tail[slots, None]) | (beginnings == NO_TOKEN)).all(dim=-1)
    penalty = torch.zeros_like(lasts, dtype=torch.float32)
    penalty.masked_fill_(said & (lasts != NO_COLUMN), -torch.inf)
    return processed.scatter_add_(1, lasts.clamp_min(0).long(), penalty)


def mask(logits: Tensor, rows: Tensor, masks: Tensor, positions: Tensor, first: int) -> Tensor:
    """Rows of logits, with -inf for tokens that their masks do not hold: [n, shard], of the dtype
    of `logits`; of rows whose position is SETTLED, anything.

    Args:
        logits: [m, shard], of the tokens from `first` on.
        rows: int64 [n].
        masks: int32 [n, words], sets as `ProcessorState` has them.
        positions: int64 [n], see `slots.ops.DrawInputs`.
    """
    tokens = torch.arange(first, first + logits.shape[1], device=logits.device)
    return logits[rows].masked_fill_(~_contains(masks, tokens), -torch.inf)


def _contains(sets: Tensor, tokens: Tensor) -> Tensor:
    """Which of the tokens int64 [t] each set int32 [n, words] holds: bool [n, t]."""
    words = sets[:, tokens // WORD_BITS]
    return (words >> (tokens % WORD_BITS).int()) & 1 != 0


def choose_process(device: torch.device) -> Process:
    """The fastest `process` that runs on `device`."""
    if device.type != "cuda":
        return process
    # Imported where it is chosen: a CPU may have no Triton, and importing it is slow.
    from nanovllm.kernels.logits import fused

    return fused.process


def choose_mask(device: torch.device) -> Mask:
    """The fastest `mask` that runs on `device`."""
    if device.type != "cuda":
        return mask
    from nanovllm.kernels.logits import fused

    return fused.mask
