"""What chats and completions ask, as structs; and what /tokenize and /detokenize do."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal, get_args

import msgspec
from msgspec import Meta

from nanovllm.protocol import NonEmptyStr, Sampling, StopString, StructuredOutputs, TokenId
from nanovllm.services.http.constraints import JsonSchema, ToolMode
from nanovllm.services.http.context import ServedModel
from nanovllm.services.http.conversation import Message, Role, Tool
from nanovllm.services.http.errors import ApiError
from nanovllm.services.http.openai.formats import (
    Choices,
    ResponseFormat,
    StructuredKeys,
    ToolChoice,
)
from nanovllm.services.http.parsing import Keys, one_of, only
from nanovllm.services.http.sampling import DrawKeys, StopStrings, sampling

MAX_CHOICES: Final = 128

_MESSAGE_HINTS: Final = {
    "messages[].role": one_of(get_args(Role)),
    "messages[].content[].type": "only text is served, no images, audio or files",
}


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class SamplingKeys(DrawKeys, kw_only=True):
    """The keys that chats and completions share."""

    not_served: ClassVar = frozenset(
        {
            *("functions", "function_call", "modalities", "audio", "prediction"),
            *("web_search_options", "reasoning_effort", "verbosity", "service_tier", "suffix"),
            *("best_of", "store", "chat_template", "documents", "truncate_prompt_tokens"),
            *("logits_processors", "thinking_token_budget", "priority"),
        }
    )
    hints: ClassVar = {
        **_MESSAGE_HINTS,
        "tool_choice": one_of(get_args(ToolMode)),
        "response_format.type": one_of(
            kind.__struct_config__.tag for kind in get_args(ResponseFormat)
        ),
    }

    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    stop: StopString | StopStrings | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
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
            only(getattr(self, key), False, key)
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options: goes with stream only", "stream_options")

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


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
        only(self.store, False, "store")
        only(self.echo, False, "echo")
        only(self.add_special_tokens, False, "add_special_tokens")
        only(self.include_reasoning, True, "include_reasoning")
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
        only(self.add_special_tokens, True, "add_special_tokens")
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


class TokenizeRequest(Keys, kw_only=True):
    """Either `prompt` or `messages`."""

    hints: ClassVar = _MESSAGE_HINTS

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


class DetokenizeRequest(Keys, kw_only=True):
    model: str | None = None
    tokens: list[TokenId]


class TemplateKeys(Keys):
    """Messages and tools as they were sent, for the chat template."""

    messages: list[dict[str, Any]] = msgspec.field(default_factory=list)
    tools: list[dict[str, Any]] | None = None


def is_continued(ask: ChatRequest | TokenizeRequest) -> bool:
    """Whether the output goes on with the last message, instead of answering it: as the request
    says, else where that message allows it.

    Raises ApiError if the last message, or the other key, does not go with that.
    """
    allowed = (ask.messages or [])[-1].can_go_on
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


def asked_sampling(
    ask: SamplingKeys,
    model: ServedModel,
    max_tokens: int | None,
    logprobs: int | None,
    outputs: StructuredOutputs | None,
) -> Sampling:
    """
    Args:
        max_tokens: None for as many as fit.
    """
    params = sampling(ask, model, max_tokens)
    params.stop = [ask.stop] if isinstance(ask.stop, str) else ask.stop or []
    params.include_stop_str_in_output = bool(ask.include_stop_str_in_output)
    params.logprobs = logprobs
    params.prompt_logprobs = ask.prompt_logprobs
    params.structured_outputs = outputs
    return params
