"""What a program gets for a request."""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.protocol import FinishReason, Logprobs, Usage


@dataclass(frozen=True, slots=True)
class Delta:
    """New output.

    Attributes:
        text: may be empty while a character is incomplete.
        token_ids: the new output tokens; the last delta may have text and no token.
        logprobs: if asked for, an entry a token: `[(token_id, logprob), …]`, the chosen one first.
    """

    text: str
    token_ids: list[int]
    logprobs: Logprobs | None


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole output of one request.

    Attributes:
        text: without special tokens, cut before the stop string if one ended it.
        token_ids: all output tokens, the end-of-sequence token included.
        finish_reason: "stop" (end of sequence, stop token or string), "length" or "abort".
        usage: token counts.
        logprobs: as in `Delta`; None unless asked for.
        seed: with it, the same request gives the same output.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    logprobs: Logprobs | None
    seed: int | None
