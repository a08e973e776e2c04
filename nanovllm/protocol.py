"""The public wire protocol (docs/protocol.md) as structs: what clients and the ingress say.

Messages are MessagePack maps whose `type` names the struct. The ingress decodes what clients send
into these, with every range of the protocol checked while decoding; clients decode what the
ingress sends.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

NonEmptyStr = Annotated[str, Meta(min_length=1)]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
# Of `Sampling`: the device has room for so many.
MAX_LOGIT_BIAS = 300
MAX_BAD_WORDS = 64
MAX_BAD_WORD_TOKENS = 16
# Of the text of a `StructuredOutputs`.
MAX_GRAMMAR_BYTES = 256 << 10
# Between the parts of JSON. Some models would never end it.
JSON_WHITE_SPACE = r"[ \t\n\r]{1,32}"
Penalty = Annotated[float, Meta(ge=-2, le=2)]
# A tiny one would make large logits infinite.
RepetitionPenalty = Annotated[float, Meta(ge=0.01, le=10)]
MinTokens = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Meta(min_length=1)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
LogitBias = Annotated[dict[TokenId, Bias], Meta(max_length=MAX_LOGIT_BIAS)]
BadWord = NonEmptyStr | Annotated[TokenIds, Meta(max_length=MAX_BAD_WORD_TOKENS)]
BadWords = Annotated[list[BadWord], Meta(max_length=MAX_BAD_WORDS)]
# Of W3C's Trace Context, version 00.
TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]

ErrorCode = Literal[
    "invalid_request",
    "context_length_exceeded",
    "duplicate_id",
    "overloaded",
    "shutting_down",
    "poisoned",
    "internal",
]
FinishReason = Literal["stop", "length", "abort"]
# One entry a token: [[token_id, logprob], …], the chosen token first.
Logprobs = list[list[tuple[int, float]]]
# One entry a prompt token; None for the first, which nothing comes before.
PromptLogprobs = list[list[tuple[int, float]] | None]


class Public(msgspec.Struct, kw_only=True, tag_field="type", omit_defaults=True):
    """Base of the public messages."""


# Client to ingress ------------------------------------------------------------------------------


class Reasoning(msgspec.Struct, forbid_unknown_fields=True):
    """The tokens between which the model reasons before it answers: `<think>` and `</think>`."""

    open: TokenId
    close: TokenId


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What the whole answer must be. Exactly one key is given.

    Attributes:
        json_schema: JSON that this schema, itself JSON text, takes.
        json_object: any JSON object.
        regex: text that the whole expression matches.
        choice: one of these texts.
        grammar: text of this grammar, in llguidance's form of Lark.

    Raises:
        ValueError: unless exactly one is given, of MAX_GRAMMAR_BYTES at most.
    """

    json_schema: NonEmptyStr | None = None
    json_object: Literal[True] | None = None
    regex: NonEmptyStr | None = None
    choice: Annotated[list[NonEmptyStr], Meta(min_length=1)] | None = None
    grammar: NonEmptyStr | None = None

    def __post_init__(self) -> None:
        given = [getattr(self, key) for key in self.__struct_fields__]
        if len(given) - given.count(None) != 1:
            raise ValueError(f"exactly one of {', '.join(self.__struct_fields__)} must be given")
        if self.size > MAX_GRAMMAR_BYTES:
            raise ValueError(f"{self.size} bytes, and at most {MAX_GRAMMAR_BYTES} are possible")

    @property
    def size(self) -> int:
        """The bytes of its text."""
        texts = [self.json_schema or self.regex or self.grammar or "", *(self.choice or ())]
        return sum(len(text.encode()) for text in texts)


class Sampling(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    temperature: Annotated[float, Meta(ge=0, le=10)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    max_tokens: Annotated[int, Meta(ge=1)] = 64
    stop: Annotated[list[StopString], Meta(max_length=16)] = []
    stop_token_ids: list[TokenId] = []
    ignore_eos: bool = False
    seed: Int64 | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    repetition_penalty: RepetitionPenalty = 1.0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    logit_bias: LogitBias = {}
    min_tokens: MinTokens = 0
    bad_words: BadWords = []
    allowed_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None


class Generate(Public, tag="generate", forbid_unknown_fields=True):
    id: NonEmptyStr  # at most 128 bytes of UTF-8: checked by the ingress
    prompt: NonEmptyStr | None = None
    prompt_token_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False
    reasoning: Reasoning | None = None
    sampling: Sampling = msgspec.field(default_factory=Sampling)
    stream: bool = True
    resume_token_ids: list[TokenId] = []
    cache_salt: str | None = None
    client: NonEmptyStr | None = None  # at most 128 bytes, too
    traceparent: str | None = None
    timings: bool = False

    def __post_init__(self) -> None:
        if self.traceparent is not None and not TRACEPARENT.fullmatch(self.traceparent):
            raise ValueError(
                "traceparent: must be 00, the trace's id in 32 hexadecimal digits, the span's"
                " in 16, and flags in 2, with - between them: lower case, no id of zeros alone"
            )


class Abort(Public, tag="abort", forbid_unknown_fields=True):
    id: str


class Ping(Public, tag="ping", forbid_unknown_fields=True):
    id: str | None = None


ClientMessage = Generate | Abort | Ping


# Ingress to client ------------------------------------------------------------------------------


class Accepted(Public, tag="accepted"):
    id: str
    session: str
    seed: int


class Delta(Public, tag="delta", omit_defaults=False):
    id: str
    offset: int
    token_ids: list[int]
    text: str
    answer_at: int | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET
    logprobs: Logprobs | msgspec.UnsetType = msgspec.UNSET


class Usage(msgspec.Struct):
    """`timings` are there if asked for: name and µs of each phase."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    timings: list[tuple[str, int]] | msgspec.UnsetType = msgspec.UNSET


class Finish(Public, tag="finish", omit_defaults=False):
    """`text`, `token_ids` and `seed` are there with `stream` false only."""

    id: str
    finish_reason: FinishReason
    usage: Usage
    text: str | msgspec.UnsetType = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    answer_at: int | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET
    logprobs: Logprobs | msgspec.UnsetType = msgspec.UNSET
    seed: int | msgspec.UnsetType = msgspec.UNSET


class Error(Public, tag="error", omit_defaults=False):
    id: str | None
    code: ErrorCode
    message: str


class Pong(Public, tag="pong", omit_defaults=False):
    id: str | None
    session: str
    version: str
    model: str
    ready: bool


ServerMessage = Accepted | Delta | Finish | Error | Pong
