"""What the scheduler knows of one request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from nanovllm.messages import FinishReason, Submit, TokenLogprobs, unpack
from nanovllm.services.scheduler.blocks import TOKEN_BYTES, Prefix, root

NO_SLOT = -1


class Finish(NamedTuple):
    """The output ended with its `completion_tokens`-th token."""

    reason: FinishReason
    completion_tokens: int


class InHand(NamedTuple):
    """Whom a service works on; `others`: it may be at work on more still, which have left."""

    uids: list[int]
    others: bool


@dataclass(slots=True, eq=False)
class Sequence:
    """One attempt of a request.

    Attributes:
        submit: as it came; once it has finished, without its prompt.
        prompt_tokens: how many there are, or were.
        output: int32, as of when it last had no slot: while it has one, `Slots` has its tokens.
        stop_ids: the tokens that end it.
        slot: where it runs, or NO_SLOT.
        blocks: its block table.
        prefix: the chain of those of its blocks that have a name.
        cached_tokens: of the prompt, found in the cache when it was first admitted; None before.
        logprobs: of the tokens sampled so far, if asked for.
        finish: how it ended; None before.
    """

    submit: Submit
    prompt_tokens: int = field(init=False)
    output: bytes = field(init=False)
    stop_ids: frozenset[int] = field(init=False)
    slot: int = NO_SLOT
    blocks: list[int] = field(default_factory=list)
    prefix: Prefix = field(init=False)
    cached_tokens: int | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: Finish | None = None

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.submit.prompt) // TOKEN_BYTES
        self.output = self.submit.output
        self.stop_ids = frozenset(unpack(self.submit.stop_token_ids).tolist())
        self.prefix = root(self.submit.cache_salt)

    @property
    def uid(self) -> int:
        return self.submit.uid

    @property
    def attempt(self) -> int:
        return self.submit.attempt

    @property
    def tokens(self) -> bytes:
        """Prompt and output (int32) of a sequence that has no slot and has not finished."""
        return self.submit.prompt + self.output

    def end(self, finish: Finish) -> None:
        """It has finished: only its output is needed from here on."""
        self.finish = finish
        self.submit = msgspec.structs.replace(self.submit, prompt=b"", output=b"")

    def ending(self) -> Finish | None:
        """How the output that it has without a slot ends it, if it does."""
        output = unpack(self.output).tolist()
        for place, token_id in enumerate(output[: self.submit.max_tokens], 1):
            if token_id in self.stop_ids:
                return Finish("stop", place)
        if len(output) >= self.submit.max_tokens:
            return Finish("length", self.submit.max_tokens)
        return None
