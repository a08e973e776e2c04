"""What a client waits for: the output of a request, the answer to a ping, or an error."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from nanovllm.protocol import Delta as WireDelta
from nanovllm.protocol import (
    ErrorCode,
    Finish,
    FinishReason,
    Generate,
    Logprobs,
    Ping,
    Pong,
    PromptLogprobs,
)
from nanovllm.protocol import Usage as WireUsage

AnswerT = TypeVar("AnswerT")

_encode = msgspec.msgpack.Encoder().encode
_ids = itertools.count()


def new_id() -> str:
    """An id that no other message of this process has."""
    return str(next(_ids))


class RequestError(Exception):
    """The pipeline refused or gave up one request.

    Attributes:
        code: one of the protocol's: `invalid_request`, `context_length_exceeded`, `duplicate_id`,
            `overloaded`, `shutting_down`, `poisoned`, `internal`.
        message: what was wrong, in words.
    """

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class StreamClosed(RuntimeError):
    """A stream that the program itself has closed has no more Deltas, also none that had come."""


class PipelineUnavailable(ConnectionError):
    """No pipeline answers at the endpoint."""


@dataclass(frozen=True, slots=True)
class Delta:
    """New output.

    Attributes:
        text: may be empty while a character is incomplete.
        token_ids: the new output tokens; the last delta may have text and no token.
        logprobs: if asked for, an entry a token: `[(token_id, logprob), …]`, the chosen one first.
        answer_at: in the delta in which the answer begins, the characters of `text` before it;
            None in the others, and where the request says nothing of reasoning.
        prompt_logprobs: in the first delta, if asked for: an entry a prompt token, as `logprobs`;
            None for the first token.
    """

    text: str
    token_ids: list[int]
    logprobs: Logprobs | None
    answer_at: int | None = None
    prompt_logprobs: PromptLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """How many tokens a request had: prompt and output, and those of the prompt whose keys and
    values were in the prefix cache. `timings` are name and µs of each phase, of a
    `Generate` that asks for them."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    timings: list[tuple[str, int]] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole output of one request. `dataclasses.asdict` of it is ready for JSON.

    Attributes:
        text: without special tokens, cut before the stop string if one ended it.
        token_ids: all output tokens, the end-of-sequence token included.
        finish_reason: "stop" (end of sequence, stop token or string), "length" or "abort".
        usage: token counts.
        logprobs: as in `Delta`; None unless asked for.
        seed: with it, the same request gives the same output.
        answer_at: the characters of `text` before the answer; None if the output ended before the
            answer began, or the request says nothing of reasoning.
        prompt_logprobs: as in `Delta`; None unless asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    logprobs: Logprobs | None
    seed: int | None
    answer_at: int | None = None
    prompt_logprobs: PromptLogprobs | None = None


class _Pending(Generic[AnswerT]):
    """A message to the ingress, until its answer has come or has failed to come.

    Args:
        on_change: called in the connection's thread when there is output, an answer or a failure,
            perhaps more than once.
    """

    def __init__(self, on_change: Callable[[], object]) -> None:
        self.on_change = on_change
        self.answer: AnswerT | None = None
        self.failure: Exception | None = None

    @property
    def ended(self) -> bool:
        return self.answer is not None or self.failure is not None

    def result(self) -> AnswerT:
        """The answer; raises `failure` if there is one."""
        if self.failure is not None:
            raise self.failure
        if self.answer is None:
            raise RuntimeError("there is no answer yet")
        return self.answer


class PendingPing(_Pending[Pong]):
    def __init__(self, on_change: Callable[[], object]) -> None:
        super().__init__(on_change)
        self.message = Ping(id=new_id())

    def encoded(self) -> bytes:
        return _encode(self.message)


class PendingRequest(_Pending[Completion]):
    """One request, with the output received so far.

    Args:
        message: the request.
        on_change: see above.
        patient: whether the request waits when the ingress is overloaded, instead of failing.
        keeps_logprobs: whether the Completion has those that Deltas had.
    """

    def __init__(
        self,
        message: Generate,
        on_change: Callable[[], object],
        *,
        patient: bool = False,
        keeps_logprobs: bool = True,
    ) -> None:
        super().__init__(on_change)
        self.message = message
        self.deltas: deque[Delta] = deque()  # received, and not yet taken by the reader
        self.accepted = False
        self.unanswered_bytes = 0  # the size of the request; 0 once the ingress has answered it
        self.waits_for_room = patient  # whether `overloaded` means later
        self._keeps_logprobs = keeps_logprobs
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: Logprobs = []
        self._seed: int | None = message.sampling.seed
        self._answer_at: int | None = None
        self._prompt_logprobs: PromptLogprobs | None = None

    def encoded(self) -> bytes:
        """The request as it is to be submitted now. A stream resumes after the tokens received so
        far; a stream without any starts anew, with the seed that the ingress has drawn for it."""
        sampling = msgspec.structs.replace(self.message.sampling, seed=self._seed)
        message = msgspec.structs.replace(self.message, sampling=sampling)
        if self._token_ids:
            message.resume_token_ids = self._token_ids
        raw = _encode(message)
        self.unanswered_bytes = len(raw)
        return raw

    def accept(self, seed: int) -> None:
        self.accepted = True
        self.unanswered_bytes = 0
        self.waits_for_room = True  # an accepted request that is submitted again does not fail
        if self._seed is None:
            self._seed = seed

    def extend(self, delta: WireDelta) -> bool:
        """Adds new output; False if `delta` does not begin where the output so far ends."""
        if delta.offset != len(self._token_ids):
            return False
        self.unanswered_bytes = 0
        logprobs = delta.logprobs or []
        answer_at: int | None = None
        if delta.answer_at is not msgspec.UNSET and self._answer_at is None:
            answer_at = delta.answer_at
            self._answer_at = sum(map(len, self._texts)) + answer_at
        prompt_logprobs = delta.prompt_logprobs or None
        self._token_ids += delta.token_ids
        self._texts.append(delta.text)
        if self._keeps_logprobs:
            self._logprobs += logprobs
            self._prompt_logprobs = self._prompt_logprobs or prompt_logprobs
        self.deltas.append(
            Delta(delta.text, delta.token_ids, self._if_asked(logprobs), answer_at, prompt_logprobs)
        )
        return True

    def finish(self, finish: Finish) -> None:
        if not self.message.stream:  # `finish` carries the whole output
            self._texts = [finish.text or ""]
            self._token_ids = finish.token_ids or []
            self._logprobs = finish.logprobs or []
            self._seed = self._seed if finish.seed is msgspec.UNSET else finish.seed
            self._answer_at = None if finish.answer_at is msgspec.UNSET else finish.answer_at
            self._prompt_logprobs = finish.prompt_logprobs or None
        self.answer = Completion(
            text="".join(self._texts),
            token_ids=self._token_ids,
            finish_reason=finish.finish_reason,
            usage=_usage(finish.usage),
            logprobs=self._if_asked(self._logprobs),
            seed=self._seed,
            answer_at=self._answer_at,
            prompt_logprobs=self._prompt_logprobs,
        )

    def _if_asked(self, logprobs: Logprobs) -> Logprobs | None:
        return None if self.message.sampling.logprobs is None else logprobs


def _usage(usage: WireUsage) -> Usage:
    return Usage(
        usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.timings or None
    )


Pending = PendingRequest | PendingPing
