"""The one form into which chats, Responses and Messages are translated."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec
from starlette.requests import Request

from nanovllm.messages import Chat
from nanovllm.protocol import Generate, NonEmptyStr, Sampling
from nanovllm.services.http.calls import Calls, client_name
from nanovllm.services.http.context import DoorContext
from nanovllm.services.http.sampling import copies
from nanovllm.services.http.tracing import asked_of

Role = Literal["system", "developer", "user", "assistant", "tool"]


class Part(msgspec.Struct):
    text: str
    type: Literal["text"]


class FunctionCall(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any] = "{}"


class MessageToolCall(msgspec.Struct, kw_only=True):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What chat templates know of."""

    role: Role
    content: str | list[Part] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    reasoning_content: str | None = None
    is_error: bool | None = None

    def __post_init__(self) -> None:
        if self.content is None and self.role != "assistant":
            raise ValueError("content: missing; only an assistant's message may have none")

    @property
    def can_go_on(self) -> bool:
        """Whether the output may go on with this message, where it is the last."""
        parts = self.content
        text = any(part.text for part in parts) if isinstance(parts, list) else bool(parts)
        return self.role == "assistant" and text and not self.tool_calls


class Function(msgspec.Struct, omit_defaults=True):
    name: NonEmptyStr
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    type: Literal["function"] = "function"
    function: Function


def chat_of(
    messages: list[Message], functions: list[Function], template_kwargs: dict[str, Any]
) -> Chat:
    """The prompt, for the chat template. A last message of the assistant's goes on."""
    return Chat(
        messages=msgspec.to_builtins(messages),
        tools=[msgspec.to_builtins(Tool(function=f)) for f in functions] or None,
        template_kwargs=template_kwargs,
        continue_final_message=messages[-1].can_go_on,
    )


class Conversation(NamedTuple):
    """What a request asks: the next message of a conversation.

    Attributes:
        chat: the prompt.
        sampling: how to draw the next message.
        stream: whether the answer comes as a stream.
        answer_key: the key of the body that is `structured_outputs` to the pipeline.
        cache_salt: None where the prefix cache is shared.
        choices: how many next messages are drawn.
    """

    chat: Chat
    sampling: Sampling
    stream: bool
    answer_key: str
    cache_salt: str | None = None
    choices: int = 1

    @property
    def has_tools(self) -> bool:
        """Whether the answer may hold tool calls."""
        return self.chat.tools is not None

    def begin(self, request: Request, context: DoorContext, body: bytes) -> Calls:
        """Submits it to the pipeline.

        Raises ApiError if it cannot be sent.
        """
        message = Generate(
            id="",
            messages=self.chat.messages,
            tools=self.chat.tools,
            chat_template_kwargs=self.chat.template_kwargs,
            continue_final_message=self.chat.continue_final_message,
            reasoning=context.model.reasoning,
            sampling=self.sampling,
            stream=self.stream,
            cache_salt=self.cache_salt,
            client=client_name(request),
            **asked_of(request),
        )
        messages = copies(context, [message], self.choices, body)
        return Calls(context, request, messages, self.answer_key)
