"""One request, from the client's message to its end."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from nanovllm import protocol
from nanovllm.messages import ChatMessage, Sampling, Tokenize, pack
from nanovllm.protocol import Error, Finish, FinishReason, Generate, Usage
from nanovllm.services.ingress.output import Output
from nanovllm.transport.links import Peer

if TYPE_CHECKING:
    from nanovllm.services.ingress.sessions import Session


class Stage(enum.Enum):
    """How far the latest attempt has come."""

    WAITING = enum.auto()  # for a tokenizer with room
    TOKENIZING = enum.auto()
    HANDED_ON = enum.auto()  # to the scheduler, which has not said so yet
    ADMITTED = enum.auto()  # the scheduler has it
    OVER = enum.auto()  # it has its outcome, or nobody waits for one


class Request:
    """A client's request, and where it stands.

    Attributes:
        uid: its name inside the pipeline.
        session: who asked.
        size: how many bytes it came in.
        seed: the client's, or the one that was drawn.
        output: what it has produced.
        prompt_tokens: the prompt's length; of text it is known once a tokenizer has told it, and 0
            until then.
        attempt, stage, tokenizer: the latest attempt; `tokenizer` has it, or had it last, until
            it is admitted.
        may_be_scheduled: whether the scheduler may know it, so that its end must be told.
        accepted: whether the client was told that it will be carried to its end.
        outcome: its last message, once known.
        unsent: whether it stands in its session's list of streams with something to send.
    """

    __slots__ = (
        "_ask",
        "accepted",
        "attempt",
        "id",
        "may_be_scheduled",
        "outcome",
        "output",
        "prompt_tokens",
        "seed",
        "session",
        "size",
        "stage",
        "stream",
        "tokenizer",
        "uid",
        "unsent",
    )

    def __init__(
        self,
        uid: int,
        ask: Generate,
        size: int,
        seed: int,
        max_model_len: int,
        session: Session,
    ) -> None:
        resumed = pack(ask.resume_token_ids)
        self.uid = uid
        self.id = ask.id
        self.session = session
        self.stream = ask.stream
        self.size = size
        self.seed = seed
        self.output = Output(resumed, with_logprobs=ask.sampling.logprobs is not None)
        self.prompt_tokens = len(ask.prompt_token_ids or ())
        self.attempt = 0
        self.stage = Stage.WAITING
        self.tokenizer: Peer | None = None
        self.may_be_scheduled = False
        self.accepted = False
        self.outcome: Finish | Error | None = None
        self.unsent = False
        self._ask = _first_attempt(uid, ask, seed, max_model_len, resumed)

    def tokenize(self) -> Tokenize:
        """The latest attempt, with the output so far."""
        return msgspec.structs.replace(
            self._ask, attempt=self.attempt, output=bytes(self.output.tokens)
        )

    def finish(self, reason: FinishReason, usage: Usage) -> None:
        """Sets the outcome. Without `stream` it takes the whole output with it."""
        self.outcome = Finish(id=self.id, finish_reason=reason, usage=usage)
        if not self.stream:
            everything = self.output.take_all(self.id)
            self.outcome.text = everything.text
            self.outcome.token_ids = everything.token_ids
            self.outcome.logprobs = everything.logprobs
            self.outcome.seed = self.seed

    def usage_so_far(self) -> Usage:
        """For a request that is cut short."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.output.num_tokens,
            cached_tokens=0,
        )

    def take(self) -> list[protocol.ServerMessage]:
        """What the client of a stream has not been sent yet."""
        messages: list[protocol.ServerMessage] = []
        if (delta := self.output.take(self.id)) is not None:
            messages.append(delta)
        if self.outcome is not None:
            messages.append(self.outcome)
        return messages


def begun(requests: Iterable[Request]) -> list[Request]:
    """Those that have left this process, and are not over."""
    here = (Stage.WAITING, Stage.OVER)
    return [request for request in requests if request.stage not in here]


def _first_attempt(
    uid: int, ask: Generate, seed: int, max_model_len: int, resumed: bytes
) -> Tokenize:
    sampling = ask.sampling
    chat: list[ChatMessage] | None = None
    if ask.messages is not None:
        chat = [ChatMessage(said.role, said.content) for said in ask.messages]
    return Tokenize(
        uid=uid,
        attempt=0,
        text=ask.prompt,
        token_ids=None if ask.prompt_token_ids is None else pack(ask.prompt_token_ids),
        chat=chat,
        chat_template_kwargs=ask.chat_template_kwargs or {},
        sampling=Sampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=seed,
            logprobs=sampling.logprobs,
        ),
        max_tokens=min(sampling.max_tokens, max_model_len),
        stop=sampling.stop,
        stop_token_ids=pack(sorted(set(sampling.stop_token_ids))),
        ignore_eos=sampling.ignore_eos,
        cache_salt=ask.cache_salt or "",
        output=resumed,
        resumed=len(resumed) // 4,
    )
