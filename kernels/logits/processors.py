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
    """

    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    min_length: Tensor
    seen: Tensor
    allowed: Tensor
    held_off: Tensor


Mask = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
Process = Callable[[Tensor, ProcessorState, Tensor, Tensor, int], None]


def process(
    logits: Tensor, state: ProcessorState, slots: Tensor, positions: Tensor, first: int
) -> None:
    """Applies the processors in place.

    1. Repetition penalty (Keskar et al., 2019, "CTRL"): of a token in prompt or output, a positive
       logit is divided by it, a negative one multiplied.
    2. Frequency and presence penalty: of a token that is c times in the output, c times the first
       is subtracted, and the second.
    3. Tokens that are not allowed, or held off, get -inf.

    Args:
        logits: float32 [n, shard], of the tokens from `first` on.
        slots: int64 [n], the rows' slots.
        positions: int64 [n], the index in its sequence that the sampled token will have.
    """
    seen = state.seen[slots].int()
    count = seen & MOST_COUNTED
    repetition = state.repetition[slots, None]
    penalized = torch.where(logits > 0, logits / repetition, logits * repetition)
    torch.where(seen != 0, penalized, logits, out=logits)
    logits -= state.frequency[slots, None] * count
    logits -= state.presence[slots, None] * (count > 0)
    tokens = torch.arange(first, first + logits.shape[1], device=logits.device)
    early = (positions < state.min_length[slots])[:, None]
    ruled_out = ~_contains(state.allowed[slots], tokens)
    ruled_out |= early & _contains(state.held_off[slots], tokens)
    logits.masked_fill_(ruled_out, -torch.inf)


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
