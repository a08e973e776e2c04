"""What the application answers, as structs."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from nanovllm.client.results import Usage as PipelineUsage


class Model(msgspec.Struct, kw_only=True):
    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "nanovllm"


class ModelList(msgspec.Struct):
    data: list[Model]
    object: Literal["list"] = "list"


class Version(msgspec.Struct):
    version: str


class Tokens(msgspec.Struct):
    """`token_strs`: the tokens' text, if asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(msgspec.Struct):
    prompt: str


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    """`timings`: name and µs of each phase, if asked for and there is one output."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    timings: list[tuple[str, int]] | UnsetType = UNSET


def usage_of(outputs: list[PipelineUsage], *, choices: int = 1, prompt_only: bool = False) -> Usage:
    """The usage of `choices` outputs for each prompt, of which the first counts the prompt.

    Args:
        prompt_only: whether the outputs are not part of the answer.
    """
    prompts = outputs[::choices]
    prompt = sum(output.prompt_tokens for output in prompts)
    completion = 0 if prompt_only else sum(output.completion_tokens for output in outputs)
    cached = sum(output.cached_tokens for output in prompts)
    timings = (outputs[0].timings or UNSET) if len(outputs) == 1 else UNSET
    return Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached), timings)


class LikelyPromptToken(msgspec.Struct, gc=False):
    logprob: float
    decoded_token: str


# An entry a prompt token, by token id; None for the first.
PromptLogprobs = list[dict[int, LikelyPromptToken] | None]


# Chats ------------------------------------------------------------------------------------------


class LikelyToken(msgspec.Struct, gc=False):
    """`bytes` are the token's own, of which `token` shows what is UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(LikelyToken, gc=False):
    top_logprobs: list[LikelyToken]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]


class FunctionCalled(msgspec.Struct):
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCalled(msgspec.Struct):
    """`index` is there in a stream only, where `id` and `type` come once."""

    function: FunctionCalled
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    index: int | UnsetType = UNSET


class AssistantMessage(msgspec.Struct, kw_only=True):
    content: str | None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCalled] | UnsetType = UNSET
    refusal: None = None
    role: Literal["assistant"] = "assistant"


ChatFinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(msgspec.Struct):
    index: int
    message: AssistantMessage
    finish_reason: ChatFinishReason
    logprobs: ChatLogprobs | None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


class ChatDelta(msgspec.Struct, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCalled] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    finish_reason: ChatFinishReason | None = None
    logprobs: ChatLogprobs | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    """`usage` is there if the request includes it: null in all chunks but the last."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


# Completions ------------------------------------------------------------------------------------


class CompletionLogprobs(msgspec.Struct):
    """An entry a token, with no logprobs for a prompt's first. A token that is not UTF-8 is
    written as `bytes:\\xf0\\x9f`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(msgspec.Struct):
    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: CompletionLogprobs | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class TextCompletion(msgspec.Struct, kw_only=True):
    """A whole completion, or a chunk of a stream."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"
