"""One request, from its client's message to its last answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from nanovllm.block_names import TOKEN_BYTES, name_of, root_name
from nanovllm.messages import AnswerMarks, Submit, Tokenize, Tokenized
from nanovllm.protocol import (
    Accepted,
    Error,
    Finish,
    FinishReason,
    Sampling,
    ServerMessage,
    Usage,
)
from nanovllm.services.ingress.output import Output
from nanovllm.services.ingress.timeline import Timeline
from nanovllm.tracing import Span

if TYPE_CHECKING:
    from nanovllm.services.ingress.engine import Engine
    from nanovllm.services.ingress.sessions import Session


# What a token id in a list takes.
LISTED_ID_BYTES = 36


@dataclass(slots=True, eq=False)
class Request:
    """A client's request, and its progress. A request is over when it has its outcome, or when its
    client has gone: no service goes on with it."""

    uid: int  # its name inside the pipeline
    id: str  # its name for the client
    session: Session
    client: str  # whose request it is in its session; "" where it did not say
    stream: bool
    seed: int  # the client's, or the one that was drawn
    resumed: int  # output tokens that the client brought
    cache_salt: str
    sampling: Sampling  # the client's; once a tokenizer has answered, the tokenizer's
    output: Output
    size: int  # bytes that count in the bound of all requests held
    tokenize: Tokenize | None  # the message for a tokenizer, until one has answered
    prompt: bytes = b""  # int32, once a tokenizer has answered
    answer_marks: AnswerMarks | None = None
    attempt: int = 0
    engine: Engine | None = None  # which has the request
    # The names of its full blocks, where engines are chosen by these.
    block_names: list[bytes] | None = None
    over: bool = False
    outcome: Finish | Error | None = None  # the last message for the client
    unsent: bool = False  # whether the session's list of unsent streams has the request
    unsent_bytes: int = 0  # about what its output takes there
    timeline: Timeline | None = None  # of a request that is traced, or whose timings are asked for

    @property
    def prompt_tokens(self) -> int:
        """The prompt's length; 0 while a text is not tokenized."""
        prompt = self.prompt if self.tokenize is None else self.tokenize.prompt_token_ids
        return len(prompt or b"") // 4

    def next_attempt(self, engine: int) -> None:
        """The engine of this number is given the request."""
        self.attempt += 1
        if self.timeline is not None:
            self.timeline.given(self.attempt, engine)

    def tokenized(self, answer: Tokenized) -> None:
        """Keeps a tokenizer's answer in place of the message for it."""
        if self.timeline is not None:
            self.timeline.tokenized()
        self.tokenize = None
        self.answer_marks = answer.answer_marks
        self.prompt = answer.prompt
        self.sampling = answer.sampling
        listed = len(self.sampling.stop_token_ids) + len(self.sampling.allowed_token_ids or ())
        self.size = len(self.prompt) + 4 * self.resumed + LISTED_ID_BYTES * listed
        if (asked := self.sampling.structured_outputs) is not None:
            self.size += asked.size

    def name_blocks(self, block_size: int) -> None:
        """Brings `block_names` up to date with prompt and output."""
        names = self.block_names = self.block_names or []
        width = TOKEN_BYTES * block_size
        full = (len(self.prompt) + len(self.output.tokens)) // width
        if len(names) < full:
            tokens = self.prompt + self.output.tokens
            name = names[-1] if names else root_name(self.cache_salt)
            for start in range(len(names) * width, full * width, width):
                name = name_of(name, tokens[start : start + width])
                names.append(name)

    def accepted(self) -> Accepted:
        """The message for the client of a stream once its request is tokenized."""
        return Accepted(id=self.id, session=self.session.name, seed=self.seed)

    def submit(self) -> Submit:
        """The message for a scheduler: the latest attempt, with the output so far.

        Log-probabilities of the prompt come with the first output. What is there, is not computed
        again.
        """
        sampling = self.sampling
        if self.output.tokens and sampling.prompt_logprobs is not None:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        return Submit(
            uid=self.uid,
            attempt=self.attempt,
            prompt=self.prompt,
            output=bytes(self.output.tokens),
            resumed=self.resumed,
            sampling=sampling,
            cache_salt=self.cache_salt,
            answer_marks=self.answer_marks,
            timed=self.timeline is not None,
        )

    def finish(self, reason: FinishReason, usage: Usage) -> None:
        """Sets the outcome. Without `stream` the outcome carries the whole output."""
        if self.timeline is not None:
            self.timeline.end()
            if self.timeline.wanted:
                usage.timings = self.timeline.timings
        self.outcome = Finish(id=self.id, finish_reason=reason, usage=usage)
        if not self.stream:
            everything = self.output.take_all(self.id)
            self.outcome.text = everything.text
            self.outcome.token_ids = everything.token_ids
            self.outcome.answer_at = everything.answer_at
            self.outcome.prompt_logprobs = everything.prompt_logprobs
            self.outcome.logprobs = everything.logprobs
            self.outcome.seed = self.seed

    def usage_so_far(self) -> Usage:
        """The usage of a request that is cut short."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.output.num_tokens,
            cached_tokens=0,
        )

    def spans(self) -> list[Span]:
        """Its spans, once it is over; none if it is not traced."""
        if self.timeline is None:
            return []
        attributes: dict[str, str | int] = {
            "nanovllm.request": f"{self.uid:x}",
            "gen_ai.usage.input_tokens": self.prompt_tokens,
            "gen_ai.usage.output_tokens": self.output.num_tokens,
        }
        error = None
        if isinstance(self.outcome, Error):
            error = self.outcome.code  # its message may say what the client wrote
        else:  # without an outcome its client has gone
            reason = "abort" if self.outcome is None else self.outcome.finish_reason
            attributes["nanovllm.finish_reason"] = reason
        return self.timeline.spans(attributes, error)

    def take(self) -> list[ServerMessage]:
        """The messages that the client of a stream has not been sent yet."""
        messages: list[ServerMessage] = []
        if (delta := self.output.take(self.id)) is not None:
            messages.append(delta)
        if self.outcome is not None:
            messages.append(self.outcome)
        return messages
