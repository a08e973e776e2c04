"""What HTTP clients ask, as structs: every key that we know, with its type and range.

Unknown keys are ignored, as OpenAI's clients expect. A key that we know and do not serve has a type
that leaves only what changes nothing (null, 0, …), so that it is refused and never ignored.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

import msgspec
from msgspec import Meta

from nanovllm.protocol import (
    BadWords,
    Int64,
    LogitBias,
    MinTokens,
    NonEmptyStr,
    Penalty,
    RepetitionPenalty,
    StopString,
    TokenId,
    TokenIds,
)
from nanovllm.services.http.constraints import (
    Choices,
    JsonSchema,
    ResponseFormat,
    StructuredKeys,
    ToolChoice,
    ToolMode,
)
from nanovllm.services.http.errors import ApiError
from nanovllm.wording import key_and_reason

RequestT = TypeVar("RequestT", bound=msgspec.Struct)

MAX_CHOICES: Final = 128

_NOT_SERVED: Final = frozenset(
    {
        *("functions", "function_call", "modalities", "audio", "prediction", "web_search_options"),
        *("reasoning_effort", "verbosity", "service_tier", "suffix", "best_of"),
        *("store", "chat_template", "documents", "truncate_prompt_tokens"),
        *("logits_processors", "thinking_token_budget", "priority"),
    }
)
_PART_TYPE: Final = re.compile(r"messages\[\d+\]\.content\[\d+\]\.type")


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class SamplingKeys(msgspec.Struct, kw_only=True):
    """The keys that chats and completions share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    seed: Int64 | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=10)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: LogitBias | None = None
    min_tokens: MinTokens | None = None
    bad_words: BadWords | None = None
    allowed_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    cache_salt: NonEmptyStr | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredKeys | None = None
    guided_json: JsonSchema | None = None
    guided_regex: NonEmptyStr | None = None
    guided_choice: Choices | None = None
    guided_grammar: NonEmptyStr | None = None

    # Not served.
    best_of: Annotated[int, Meta(ge=1, le=1)] | None = None
    truncate_prompt_tokens: None = None
    logits_processors: None = None
    thinking_token_budget: None = None
    priority: Literal[0] | None = None
    use_beam_search: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    def __post_init__(self) -> None:
        for key in ("use_beam_search", "return_token_ids", "return_tokens_as_token_ids"):
            _only(getattr(self, key), False, key)
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options: goes with stream only", "stream_options")

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Part(msgspec.Struct):
    text: str
    type: Literal["text"]


class FunctionCall(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any] = "{}"


class MessageToolCall(msgspec.Struct):
    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"


Role = Literal["system", "developer", "user", "assistant", "tool"]


class Message(msgspec.Struct, kw_only=True):
    """What chat templates know of; further keys go to the template too."""

    role: Role
    content: str | list[Part] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    reasoning_content: str | None = None

    def __post_init__(self) -> None:
        if self.content is None and self.role != "assistant":
            raise ValueError("content: missing; only an assistant's message may have none")


class Function(msgspec.Struct):
    name: NonEmptyStr
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    function: Function
    type: Literal["function"] = "function"


class ChatRequest(SamplingKeys):
    messages: Annotated[list[Message], Meta(min_length=1)]
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None

    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    # Served in part, or not.
    functions: None = None
    function_call: None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    reasoning_effort: None = None
    verbosity: None = None
    service_tier: Literal["auto", "default"] | None = None
    store: bool | None = None
    echo: bool | None = None
    chat_template: None = None
    documents: None = None
    add_special_tokens: bool | None = None
    include_reasoning: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _only(self.store, False, "store")
        _only(self.echo, False, "echo")
        _only(self.add_special_tokens, False, "add_special_tokens")
        _only(self.include_reasoning, True, "include_reasoning")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs: goes with logprobs true only", "top_logprobs")


class CompletionRequest(SamplingKeys, kw_only=True):
    prompt: NonEmptyStr | Annotated[list[NonEmptyStr | TokenId | list[TokenId]], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    max_tokens: Annotated[int, Meta(ge=0)] | None = None

    # Not served.
    suffix: Literal[""] | None = None
    add_special_tokens: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _only(self.add_special_tokens, True, "add_special_tokens")
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens: 0 goes with echo only", "max_tokens")

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids.

        Raises ApiError unless all of a list are of one kind.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        kinds = {type(item) for item in self.prompt}
        if len(kinds) > 1 or [] in self.prompt:
            message = "prompt: a text, texts, token ids, or lists of token ids; none may be empty"
            raise ApiError(400, message, "prompt")
        if kinds == {int}:
            return [[item for item in self.prompt if isinstance(item, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False
    chat_template: None = None  # not served

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "exactly one of prompt and messages must be given", "prompt")


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    model: str | None = None
    tokens: list[TokenId]


def is_continued(ask: ChatRequest | TokenizeRequest) -> bool:
    """Whether the output goes on with the last message, instead of answering it: as the request
    says, else where that message allows it.

    Raises ApiError if the last message, or the other key, does not go with that.
    """
    last = (ask.messages or [])[-1]
    parts = last.content
    text = any(part.text for part in parts) if isinstance(parts, list) else bool(parts)
    allowed = last.role == "assistant" and text and not last.tool_calls
    asked, key = ask.continue_final_message, "continue_final_message"
    if asked and not allowed:
        message = (
            f"{key}: the last message is not the assistant's, or has no content or calls tools"
        )
        raise ApiError(400, message, key)
    continued = allowed if asked is None else asked
    if ask.add_generation_prompt is continued:
        message = f"add_generation_prompt: {key} is {str(continued).lower()}; send its opposite"
        raise ApiError(400, message, "add_generation_prompt")
    return continued


# What keys can be of which msgspec says only that the value is invalid.
_VALUES: Final = {
    "role": get_args(Role),
    "tool_choice": get_args(ToolMode),
    "response_format.type": [kind.__struct_config__.tag for kind in get_args(ResponseFormat)],
}


class TemplateKeys(msgspec.Struct):
    """Messages and tools as they were sent, for the chat template."""

    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] | None = None


def parse(body: bytes, kind: type[RequestT]) -> RequestT:
    """The request that `body` holds.

    Raises:
        ApiError: the body is not JSON, or a key is of the wrong type or out of range.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _refusal(*key_and_reason(error)) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None


def _refusal(key: str, reason: str) -> ApiError:
    if _PART_TYPE.fullmatch(key):
        reason = "only text is served, no images, audio or files"
    elif re.split(r"[.\[]", key)[0] in _NOT_SERVED:
        reason = f"is not served: {reason}"
    elif reason.startswith("Invalid") and (values := _VALUES.get(key.rpartition("].")[2])):
        reason = f"{reason}; must be {', '.join(values[:-1])} or {values[-1]}"
    elif found := re.search(r"required field `(\w+)`", reason):
        key, reason = ".".join(filter(None, (key, found[1]))), "missing"
    return ApiError(400, f"{key}: {reason}" if key else reason, key or None)


def _only(value: bool | None, served: bool, key: str) -> None:
    if value is not None and value is not served:
        raise ApiError(400, f"{key}: only {str(served).lower()} is served", key)
