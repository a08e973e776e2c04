"""What Anthropic's clients are answered, as structs."""

from __future__ import annotations

from typing import Literal

import msgspec

from nanovllm.client.results import Completion
from nanovllm.protocol import Reasoning
from nanovllm.services.http.answers import reasoning_tokens


class Tagged(msgspec.Struct, tag_field="type"):
    """Base of what has its name as `type`."""


# Content ----------------------------------------------------------------------------------------


class AnswerText(Tagged, tag="text"):
    text: str
    citations: None = None


class AnswerThinking(Tagged, tag="thinking"):
    thinking: str
    signature: str


class Direct(Tagged, tag="direct"):
    """The model calls the tool itself."""


class AnswerToolUse(Tagged, tag="tool_use"):
    """`input`: a JSON object, as the model has written it."""

    id: str
    name: str
    input: msgspec.Raw
    caller: Direct = msgspec.field(default_factory=Direct)


Content = AnswerText | AnswerThinking | AnswerToolUse
StopReason = Literal[
    "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
]


class ThinkingTokens(msgspec.Struct):
    thinking_tokens: int = 0


class MessageUsage(msgspec.Struct):
    """`input_tokens` does not count those that were read from the prefix cache."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    output_tokens_details: ThinkingTokens = msgspec.field(default_factory=ThinkingTokens)
    cache_creation: None = None
    inference_geo: None = None
    server_tool_use: None = None
    service_tier: Literal["standard"] = "standard"


def usage_of(completion: Completion, reasoning: Reasoning | None) -> MessageUsage:
    """
    Args:
        reasoning: the tokens around reasoning; None where the model knows none.
    """
    usage, cached = completion.usage, completion.usage.cached_tokens
    thinking = ThinkingTokens(reasoning_tokens(completion, reasoning))
    prompt = usage.prompt_tokens - cached
    return MessageUsage(prompt, usage.completion_tokens, cached, output_tokens_details=thinking)


class MessageAnswer(Tagged, tag="message", kw_only=True):
    id: str
    model: str
    content: list[Content]
    usage: MessageUsage
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    stop_details: None = None
    container: None = None
    role: Literal["assistant"] = "assistant"


class TokenCount(msgspec.Struct):
    input_tokens: int


# Events -----------------------------------------------------------------------------------------


class TextDelta(Tagged, tag="text_delta"):
    text: str


class ThinkingDelta(Tagged, tag="thinking_delta"):
    thinking: str


class SignatureDelta(Tagged, tag="signature_delta"):
    signature: str


class InputJsonDelta(Tagged, tag="input_json_delta"):
    partial_json: str


BlockDelta = TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class MessageStart(Tagged, tag="message_start"):
    """The usage is not known yet: all zero."""

    message: MessageAnswer


class ContentBlockStart(Tagged, tag="content_block_start"):
    index: int
    content_block: Content


class ContentBlockDelta(Tagged, tag="content_block_delta"):
    index: int
    delta: BlockDelta


class ContentBlockStop(Tagged, tag="content_block_stop"):
    index: int


class Stopped(msgspec.Struct):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Tagged, tag="message_delta"):
    delta: Stopped
    usage: MessageUsage


class MessageStop(Tagged, tag="message_stop"):
    pass


class Ping(Tagged, tag="ping"):
    pass


MessageEvent = (
    MessageStart
    | ContentBlockStart
    | ContentBlockDelta
    | ContentBlockStop
    | MessageDelta
    | MessageStop
    | Ping
)


# Errors -----------------------------------------------------------------------------------------


class MessageError(msgspec.Struct):
    type: str
    message: str


class MessageErrorAnswer(Tagged, tag="error"):
    error: MessageError
    request_id: str
