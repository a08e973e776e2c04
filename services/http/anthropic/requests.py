"""What Anthropic's clients ask, as structs, and the conversation that it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, get_args

import msgspec
from msgspec import Meta

from nanovllm.messages import Chat
from nanovllm.protocol import NonEmptyStr
from nanovllm.services.http.constraints import (
    ANY_ANSWER,
    ToolMode,
    ToolName,
    answer_format,
    with_tools,
)
from nanovllm.services.http.context import ServedModel
from nanovllm.services.http.conversation import (
    Conversation,
    Function,
    FunctionCall,
    Message,
    MessageToolCall,
    Part,
    chat_of,
)
from nanovllm.services.http.errors import ApiError
from nanovllm.services.http.parsing import one_of
from nanovllm.services.http.sampling import DrawKeys, StopStrings, sampling

# Blocks of content ------------------------------------------------------------------------------


class TextBlock(msgspec.Struct, tag_field="type", tag="text"):
    text: str


class ThinkingBlock(msgspec.Struct, tag_field="type", tag="thinking"):
    thinking: str


class ToolUseBlock(msgspec.Struct, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(msgspec.Struct, tag_field="type", tag="tool_result"):
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


Texts = str | list[TextBlock]
Block = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock
Role = Literal["user", "assistant", "system"]
# Whose messages a block may be in.
_ROLE_OF: dict[type[Block], Role] = {
    ThinkingBlock: "assistant",
    ToolUseBlock: "assistant",
    ToolResultBlock: "user",
}


class InputMessage(msgspec.Struct):
    role: Role
    content: str | list[Block]


# Other keys -------------------------------------------------------------------------------------


class InputTool(msgspec.Struct, kw_only=True):
    name: NonEmptyStr
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    type: Literal["custom"] | None = None


class AutoChoice(msgspec.Struct, tag_field="type", tag="auto"):
    disable_parallel_tool_use: bool | None = None


class AnyChoice(msgspec.Struct, tag_field="type", tag="any"):
    disable_parallel_tool_use: bool | None = None


class NamedChoice(msgspec.Struct, tag_field="type", tag="tool"):
    name: NonEmptyStr
    disable_parallel_tool_use: bool | None = None


class NoChoice(msgspec.Struct, tag_field="type", tag="none"):
    disable_parallel_tool_use: bool | None = None


Choice = AutoChoice | AnyChoice | NamedChoice | NoChoice

Display = Literal["summarized", "omitted"]


class ThinkingEnabled(msgspec.Struct, tag_field="type", tag="enabled"):
    """`budget_tokens` bounds nothing."""

    budget_tokens: Annotated[int, Meta(ge=1)] | None = None
    display: Display | None = None


class ThinkingAdaptive(msgspec.Struct, tag_field="type", tag="adaptive"):
    display: Display | None = None


class ThinkingDisabled(msgspec.Struct, tag_field="type", tag="disabled"):
    display: None = None


Thinking = ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled


class OutputFormat(msgspec.Struct):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct):
    """`effort` changes nothing."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Edit(msgspec.Struct):
    """Whether the thinking of earlier turns is kept is the chat template's matter."""

    type: Literal["clear_thinking_20251015"]


class ContextManagement(msgspec.Struct):
    edits: list[Edit] = []


def _tags(union: object) -> str:
    return one_of(str(kind.__struct_config__.tag) for kind in get_args(union))


class CountRequest(DrawKeys, kw_only=True):
    """The prompt, and what is not counted."""

    not_served: ClassVar = frozenset({"container", "mcp_servers", "output_format", "speed"})
    hints: ClassVar = {
        "messages[].role": one_of(get_args(Role)),
        "messages[].content[].type": f"{_tags(Block)}: no images or documents are served",
        "messages[].content[].content[].type": "only text is served, no images or documents",
        "system[].type": "only text is served",
        "tools[].type": "only tools that the client runs, of an input_schema, are served",
        "tool_choice.type": _tags(Choice),
        "thinking.type": _tags(Thinking),
    }

    messages: Annotated[list[InputMessage], Meta(min_length=1)]
    system: Texts | None = None
    tools: list[InputTool] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    output_config: OutputConfig | None = None

    # They change nothing, or are not served.
    context_management: ContextManagement | None = None
    container: None = None
    mcp_servers: Annotated[list[Any], Meta(max_length=0)] | None = None
    output_format: None = None
    speed: Literal["standard"] | None = None


class MessagesRequest(CountRequest, kw_only=True):
    max_tokens: Annotated[int, Meta(ge=1)]
    stop_sequences: StopStrings | None = None
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    @property
    def shows_thinking(self) -> bool:
        return self.thinking is None or self.thinking.display != "omitted"


# Into a conversation ----------------------------------------------------------------------------


def conversation_of(ask: MessagesRequest, model: ServedModel) -> Conversation:
    """Raises ApiError if keys do not fit together."""
    output = ask.output_config and ask.output_config.format
    answer = ANY_ANSWER
    if output:
        answer = answer_format("output_config.format", json_schema=output.schema)
    several = not (ask.tool_choice and ask.tool_choice.disable_parallel_tool_use)
    answer = with_tools(answer, _functions(ask), _tool_choice(ask.tool_choice), parallel=several)
    params = sampling(ask, model, ask.max_tokens)
    params.stop = ask.stop_sequences or []
    params.include_stop_str_in_output = True  # to tell which it was
    params.structured_outputs = answer.outputs
    return Conversation(prompt_of(ask), params, bool(ask.stream), answer.key, ask.cache_salt)


def prompt_of(ask: CountRequest) -> Chat:
    """Raises ApiError if a block is in a message of the wrong role."""
    messages = [Message(role="system", content=_content(ask.system))] if ask.system else []
    for index, message in enumerate(ask.messages):
        messages += _messages(message, f"messages[{index}]")
    functions = [] if isinstance(ask.tool_choice, NoChoice) else _functions(ask)
    thinks = isinstance(ask.thinking, ThinkingEnabled | ThinkingAdaptive)
    return chat_of(
        messages, functions, {"enable_thinking": thinks, **(ask.chat_template_kwargs or {})}
    )


def _functions(ask: CountRequest) -> list[Function]:
    return [
        Function(tool.name, tool.description, tool.input_schema, tool.strict)
        for tool in ask.tools or ()
    ]


def _tool_choice(choice: Choice | None) -> ToolMode | ToolName | None:
    if isinstance(choice, NamedChoice):
        return ToolName(choice.name)
    modes: dict[type[Choice], ToolMode] = {AnyChoice: "required", NoChoice: "none"}
    return modes.get(type(choice)) if choice else None


def _content(texts: Texts) -> str | list[Part]:
    return texts if isinstance(texts, str) else [Part(block.text, "text") for block in texts]


def _messages(message: InputMessage, where: str) -> Iterator[Message]:
    """One message, or several where there are tool results: each is a message of its own."""
    role = message.role
    if isinstance(message.content, str):
        yield Message(role=role, content=message.content)
        return
    for i, block in enumerate(message.content):
        if (own := _ROLE_OF.get(type(block), role)) != role:
            key = f"{where}.content[{i}].type"
            raise ApiError(400, f"{key}: blocks of this type go with role {own} only", key)
    if role == "assistant":
        yield _assistant(message.content)
        return
    texts: list[TextBlock] = []
    for block in message.content:
        if isinstance(block, ToolResultBlock):
            if texts:
                yield Message(role=role, content=_content(texts))
            texts = []
            yield Message(
                role="tool",
                content=_content(block.content or ""),
                tool_call_id=block.tool_use_id,
                is_error=block.is_error or None,
            )
        elif isinstance(block, TextBlock):
            texts.append(block)
    if texts or not message.content:
        yield Message(role=role, content=_content(texts))


def _assistant(blocks: list[Block]) -> Message:
    texts = [block for block in blocks if isinstance(block, TextBlock)]
    thoughts = "\n".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
    calls = [
        MessageToolCall(id=block.id, function=FunctionCall(block.name, block.input))
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    return Message(
        role="assistant",
        content=_content(texts or ""),
        reasoning_content=thoughts or None,
        tool_calls=calls or None,
    )
