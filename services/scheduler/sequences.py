"""What the scheduler knows of one request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from nanovllm.block_names import TOKEN_BYTES
from nanovllm.messages import EndReason, PromptPart, Submit, Timings, TokenLogprobs, unpack_list
from nanovllm.services.scheduler.blocks import Prefix

NO_SLOT = -1


class OutputEnd(NamedTuple):
    """The output ends with its `completion_tokens`-th token."""

    reason: EndReason
    completion_tokens: int


@dataclass(slots=True)
class Moments:
    """When what happened to a sequence whose timings are wanted, in ns."""

    submitted: int
    admitted: int | None = None  # for the first time
    first_token: int | None = None
    ended: int | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """One attempt of a request."""

    submit: Submit  # once the sequence has finished, without prompt and output
    prompt_tokens: int = field(init=False)
    # int32. While the sequence has a slot, `Slots` has the whole output.
    output: bytes = field(init=False)
    stop_ids: frozenset[int] = field(init=False)
    slot: int = NO_SLOT
    blocks: list[int] = field(default_factory=list)  # its block table
    prefix: Prefix = field(init=False)  # in a slot: the chain of its blocks that have a name
    # Prompt tokens found in the cache at the first admission; None before it.
    cached_tokens: int | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of this attempt's tokens
    # Log-probabilities of its prompt, in order: all of them once the first token is sampled.
    prompt_parts: list[PromptPart] = field(default_factory=list)
    finish: OutputEnd | None = None
    moments: Moments | None = None
    # The number of the matcher that is made for it, while it waits; whether the matcher is not
    # ready yet; and whether the matcher has to share nothing with others, since one failed.
    matcher: int | None = None
    awaits_matcher: bool = False
    matcher_alone: bool = False

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.submit.prompt) // TOKEN_BYTES
        self.output = self.submit.output
        self.stop_ids = frozenset(self.submit.sampling.stop_token_ids)

    @property
    def uid(self) -> int:
        return self.submit.uid

    @property
    def attempt(self) -> int:
        return self.submit.attempt

    @property
    def timings(self) -> Timings | None:
        """None before its first token, or if they are not wanted."""
        moments = self.moments
        if moments is None or moments.admitted is None or moments.first_token is None:
            return None
        decode = None if moments.ended is None else (moments.ended - moments.first_token) // 1000
        return Timings(
            (moments.admitted - moments.submitted) // 1000,
            (moments.first_token - moments.admitted) // 1000,
            decode,
        )

    @property
    def tokens(self) -> bytes:
        """Prompt and output (int32) of a sequence that has no slot and has not finished."""
        return self.submit.prompt + self.output

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of its prompt are asked for, and not all there."""
        asked = self.submit.sampling.prompt_logprobs is not None
        return asked and self._prompt_end < self.prompt_tokens

    def add_prompt_part(self, part: PromptPart) -> None:
        """Adds the next log-probabilities of its prompt. The first ones begin anew: the sequence
        was preempted."""
        if part.first == 1:
            self.prompt_parts.clear()
        if part.first == max(1, self._prompt_end):
            self.prompt_parts.append(part)

    @property
    def _prompt_end(self) -> int:
        """The index in the prompt up to which log-probabilities are there."""
        if not self.prompt_parts:
            return 0
        last = self.prompt_parts[-1]
        return last.first + len(last.token_ids) // (4 * last.width)

    def end(self, finish: OutputEnd) -> None:
        """Marks the sequence as finished. From here on only its output is needed."""
        self.finish = finish
        self.submit = msgspec.structs.replace(self.submit, prompt=b"", output=b"")

    def ending(self) -> OutputEnd | None:
        """The end of the sequence, if its output holds one. Not for a sequence in a slot."""
        output = unpack_list(self.output)
        sampling = self.submit.sampling
        max_tokens = sampling.max_tokens
        for count, token_id in enumerate(output[:max_tokens], 1):
            if token_id in self.stop_ids and count > sampling.min_tokens:
                return OutputEnd("stop", count)
        return OutputEnd("length", max_tokens) if len(output) >= max_tokens else None
