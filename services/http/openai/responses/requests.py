"""What clients of Responses ask, as structs, and the conversation that it is."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal, get_args

import msgspec
from msgspec import Meta

from nanovllm.messages import Chat
from nanovllm.protocol import NonEmptyStr
from nanovllm.services.http.constraints import (
    ANY_ANSWER,
    AnswerFormat,
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
from nanovllm.services.http.openai.formats import JsonObjectFormat, TextFormat
from nanovllm.services.http.parsing import one_of, only
from nanovllm.services.http.sampling import DrawKeys, sampling

Role = Literal["user", "assistant", "system", "developer"]
ItemType = Literal["message", "reasoning", "function_call", "function_call_output"]
_NEEDED: Final[dict[ItemType, tuple[str, ...]]] = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}


class TextPart(msgspec.Struct):
    text: str
    type: Literal["input_text", "output_text", "reasoning_text", "summary_text", "text"]


Texts = str | list[TextPart]


class Item(msgspec.Struct, kw_only=True):
    """An item of any type, with the keys of all."""

    type: ItemType = "message"
    role: Role | None = None
    content: Texts | None = None
    summary: list[TextPart] | None = None
    encrypted_content: Literal[""] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Texts | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None

    def __post_init__(self) -> None:
        for key in _NEEDED[self.type]:
            if getattr(self, key) is None:
                raise ValueError(f"{key}: missing in an item of type {self.type}")
        if self.type == "function_call" and not self.is_broken_call:
            try:
                msgspec.json.decode(self.arguments or "{}", type=dict[str, Any])
            except ValueError:
                raise ValueError("arguments: this is not a JSON object") from None

    @property
    def is_broken_call(self) -> bool:
        """Whether this is what a stream has given of a call that broke, and of a message too."""
        return self.type == "function_call" and self.status == "incomplete"


class FunctionTool(msgspec.Struct, kw_only=True):
    type: Literal["function"]
    name: NonEmptyStr
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(msgspec.Struct):
    name: NonEmptyStr
    type: Literal["function"] = "function"


class SchemaFormat(msgspec.Struct, tag_field="type", tag="json_schema"):
    """JSON of this schema, strict or not."""

    schema: dict[str, Any]
    name: str = ""
    description: str | None = None
    strict: bool | None = None


Format = TextFormat | JsonObjectFormat | SchemaFormat


class TextConfig(msgspec.Struct):
    format: Format | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningConfig(msgspec.Struct):
    """`effort` says whether the model is to reason. A summary is never made."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseStreamOptions(msgspec.Struct):
    include_obfuscation: bool | None = None


class ResponsesRequest(DrawKeys, kw_only=True):
    not_served: ClassVar = frozenset(
        {
            *("previous_response_id", "conversation", "prompt", "background", "max_tool_calls"),
            *("context_management", "moderation", "service_tier", "truncation", "top_logprobs"),
            "include",
        }
    )
    hints: ClassVar = {
        "previous_response_id": "responses are not kept; send all items of the conversation",
        "conversation": "conversations are not kept; send all items",
        "truncation": "a prompt that is too long is refused",
        "include[]": "only reasoning.encrypted_content, which is null: reasoning is told as text",
        "input[].type": one_of(get_args(ItemType)),
        "input[].role": one_of(get_args(Role)),
        "input[].content[].type": "only text is served, no images, audio or files",
        "input[].output[].type": "only text is served, no images, audio or files",
        "input[].encrypted_content": "another server has encrypted this; leave it out",
        "tools[].type": "only functions are served",
        "tool_choice": one_of(get_args(ToolMode)),
        "text.format.type": one_of(str(k.__struct_config__.tag) for k in get_args(Format)),
    }

    input: NonEmptyStr | Annotated[list[Item], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: ToolMode | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | None = None

    # They change nothing, or are not served.
    store: bool | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    truncation: Literal["disabled"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    top_logprobs: Literal[0] | None = None
    stream_options: ResponseStreamOptions | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    background: bool | None = None
    max_tool_calls: None = None
    context_management: Annotated[list[Any], Meta(max_length=0)] | None = None
    moderation: None = None

    def __post_init__(self) -> None:
        only(self.background, False, "background")
        if self.stream_options is not None:
            key = "stream_options.include_obfuscation"
            only(self.stream_options.include_obfuscation, False, key)


def conversation_of(ask: ResponsesRequest, model: ServedModel) -> Conversation:
    """Raises ApiError if keys do not fit together."""
    choice = ask.tool_choice
    answer = with_tools(
        _format(ask),
        _functions(ask),
        ToolName(choice.name) if isinstance(choice, NamedFunction) else choice,
        parallel=ask.parallel_tool_calls is not False,
    )
    params = sampling(ask, model, ask.max_output_tokens)
    params.structured_outputs = answer.outputs
    return Conversation(prompt_of(ask), params, bool(ask.stream), answer.key, ask.cache_salt)


def prompt_of(ask: ResponsesRequest) -> Chat:
    """Raises ApiError if the conversation is empty."""
    effort = ask.reasoning and ask.reasoning.effort
    kwargs = {"enable_thinking": effort != "none"} if effort else {}
    functions = [] if ask.tool_choice == "none" else _functions(ask)
    return chat_of(_messages(ask), functions, {**kwargs, **(ask.chat_template_kwargs or {})})


def _format(ask: ResponsesRequest) -> AnswerFormat:
    asked = ask.text and ask.text.format
    if isinstance(asked, SchemaFormat):
        return answer_format("text.format", json_schema=asked.schema)
    if isinstance(asked, JsonObjectFormat):
        return answer_format("text.format", json_object=True)
    return ANY_ANSWER


def _functions(ask: ResponsesRequest) -> list[Function]:
    return [
        Function(tool.name, tool.description, tool.parameters, tool.strict)
        for tool in ask.tools or ()
    ]


def _messages(ask: ResponsesRequest) -> list[Message]:
    messages = [Message(role="system", content=ask.instructions)] if ask.instructions else []
    if isinstance(ask.input, str):
        return [*messages, Message(role="user", content=ask.input)]
    for item in ask.input:
        if item.type == "function_call_output":
            output = _parts(item.output)
            messages.append(Message(role="tool", content=output, tool_call_id=item.call_id))
        elif item.type == "message" and item.role != "assistant":
            role = "system" if item.role == "developer" else item.role
            messages.append(Message(role=role or "user", content=_parts(item.content)))
        elif not item.is_broken_call:
            _add_to_assistant(messages, item)
    if not messages:
        raise ApiError(400, "input: nothing but calls that are incomplete", "input")
    return messages


def _add_to_assistant(messages: list[Message], item: Item) -> None:
    """Reasoning, text and calls that follow one another are one message of the assistant's, which
    begins anew with reasoning, and with text behind text."""
    last = messages[-1] if messages and messages[-1].role == "assistant" else None
    if item.type == "reasoning" or (
        last is not None and item.type == "message" and last.content and not last.tool_calls
    ):
        last = None
    if last is None:
        last = Message(role="assistant", content=[])
        messages.append(last)
    if item.type == "reasoning":
        parts = _parts(item.content) or _parts(item.summary)
        last.reasoning_content = "\n".join(part.text for part in parts) or None
    elif item.type == "message":
        last.content = [*_parts(last.content), *_parts(item.content)]
    else:
        function = FunctionCall(item.name or "", item.arguments or "{}")
        call = MessageToolCall(id=item.call_id, function=function)
        last.tool_calls = [*(last.tool_calls or ()), call]


def _parts(texts: Texts | str | list[Part] | None) -> list[Part]:
    if isinstance(texts, str):
        return [Part(texts, "text")]
    return [Part(part.text, "text") for part in texts or ()]
