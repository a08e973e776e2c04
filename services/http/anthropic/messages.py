"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic's clients know them."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from nanovllm.client.results import Completion, Delta
from nanovllm.client.results import Usage as PipelineUsage
from nanovllm.services.http.answers import AnswerReader, Piece, Reasoning, markers
from nanovllm.services.http.anthropic.answers import (
    AnswerText,
    AnswerThinking,
    AnswerToolUse,
    BlockDelta,
    Content,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    InputJsonDelta,
    MessageAnswer,
    MessageDelta,
    MessageErrorAnswer,
    MessageEvent,
    MessageStart,
    MessageStop,
    MessageUsage,
    Ping,
    SignatureDelta,
    Stopped,
    StopReason,
    TextDelta,
    ThinkingDelta,
    TokenCount,
    usage_of,
)
from nanovllm.services.http.anthropic.errors import message_error
from nanovllm.services.http.anthropic.requests import (
    CountRequest,
    MessagesRequest,
    conversation_of,
    prompt_of,
)
from nanovllm.services.http.context import DoorContext, ServedModel
from nanovllm.services.http.conversation import Conversation
from nanovllm.services.http.error_responses import request_id
from nanovllm.services.http.errors import ApiError, check_model, json_response
from nanovllm.services.http.parsing import parse
from nanovllm.services.http.streams import respond
from nanovllm.services.http.tokens import PromptTokens
from nanovllm.services.http.tool_calls import ToolCall

_encode = msgspec.json.Encoder().encode


async def messages(request: Request, context: DoorContext) -> Response:
    """Answers a conversation, whole or as a stream; raises what `chat` raises."""
    body = await request.body()
    ask = parse(body, MessagesRequest)
    check_model(ask.model, context.model.name)
    conversation = conversation_of(ask, context.model)
    calls = conversation.begin(request, context, body)
    output = MessageOutput(context.model, conversation, shows_thinking=ask.shows_thinking)
    return await respond(
        MessageEvents(request_id(request.scope)),
        calls,
        [output],
        context,
        lambda completions: json_response(output.whole(completions[0])),
        stream=conversation.stream,
    )


async def count_tokens(request: Request, context: DoorContext, tokens: PromptTokens) -> Response:
    """Raises ApiError if the request is not valid, or the chat template does not take it."""
    ask = parse(await request.body(), CountRequest)
    check_model(ask.model, context.model.name)
    return json_response(TokenCount(len(await tokens.chat_ids(prompt_of(ask)))))


class MessageEvents:
    """How events are written: each with its name.

    Args:
        request_id: of the HTTP request, for an error.
    """

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self.waiting: Final = self.event(Ping())

    def event(self, made: MessageEvent | MessageErrorAnswer) -> bytes:
        name = str(made.__struct_config__.tag)
        return b"event: " + name.encode() + b"\ndata: " + _encode(made) + b"\n\n"

    def last(self, usages: list[PipelineUsage]) -> bytes:
        return b""  # the output has said its usage

    def failed(self, error: ApiError) -> bytes:
        return self.event(message_error(error, self._request_id))


class MessageOutput:
    """The next message of a conversation, as blocks of content. Tool calls come whole: clients may
    take what has come of their input for all of it.

    Args:
        shows_thinking: whether blocks of thinking have their text.
    """

    def __init__(
        self, model: ServedModel, conversation: Conversation, *, shows_thinking: bool
    ) -> None:
        self._reader = AnswerReader(markers(model), tools=conversation.has_tools)
        self._reasoning = model.reasoning
        self._shows_thinking = shows_thinking
        self._stops = conversation.sampling.stop
        self._max_tokens = conversation.sampling.max_tokens
        self._answers = model.reasoning is None  # whether the answer has begun
        self._held = ""  # a stop string that came last
        self._texts: list[str] | None = None  # of the block that is open
        # Of the tool call that is written.
        self._name = ""
        self._texts_of_call: list[str] = []
        self._message = MessageAnswer(
            id=f"msg_{secrets.token_hex(12)}",
            model=model.name,
            content=[],
            usage=MessageUsage(),
        )

    def begin(self) -> list[MessageEvent]:
        return [MessageStart(self._message)]

    def news(self, delta: Delta) -> list[MessageEvent]:
        text = self._without_stop(self._held + delta.text, delta.answer_at)
        return list(self._take(self._reader.feed(text, delta.answer_at)))

    def end(self, completion: Completion) -> list[MessageEvent]:
        message = self._message
        pieces: list[Piece] = []
        if self._held and completion.finish_reason == "stop":
            message.stop_sequence = self._held
        elif self._held:
            pieces = self._reader.feed(self._held, None)
        events = [*self._take(pieces + self._reader.rest()), *self._close()]
        message.stop_reason = reason = self._reason(completion)
        message.usage = usage_of(completion, self._reasoning)
        stopped = Stopped(reason, message.stop_sequence)
        return [*events, MessageDelta(stopped, message.usage), MessageStop()]

    def whole(self, completion: Completion) -> MessageAnswer:
        self.news(Delta(completion.text, [], None, completion.answer_at))
        self.end(completion)
        return self._message

    def _without_stop(self, text: str, answer_at: int | None) -> str:
        """Holds a stop string that the text ends with: the pipeline gives it in one piece, which is
        the last. It looks for them in the answer alone."""
        self._answers |= answer_at is not None
        answer = text[answer_at or 0 :] if self._answers else ""
        ends = (stop for stop in self._stops if answer.endswith(stop))
        self._held = max(ends, key=len, default="")
        return text[: len(text) - len(self._held)]

    def _take(self, pieces: list[Piece]) -> Iterator[MessageEvent]:
        for piece in pieces:
            if isinstance(piece, ToolCall):
                yield from self._tool_call(piece)
            elif isinstance(piece, Reasoning):
                yield from self._open(AnswerThinking("", ""))
                if self._shows_thinking:
                    yield self._more(piece.text, ThinkingDelta(piece.text))
            else:
                yield from self._open(AnswerText(""))
                yield self._more(piece, TextDelta(piece))

    def _tool_call(self, call: ToolCall) -> Iterator[MessageEvent]:
        """Nothing, until the call is complete."""
        if call.name is not None:
            self._name, self._texts_of_call = call.name, []
        self._texts_of_call.append(call.arguments)
        if call.complete:
            arguments = "".join(self._texts_of_call)
            call_id = f"toolu_{secrets.token_hex(12)}"
            yield from self._open(AnswerToolUse(call_id, self._name, msgspec.Raw(b"{}")))
            yield self._more(arguments, InputJsonDelta(arguments))
            yield from self._close()

    def _open(self, block: Content) -> Iterator[MessageEvent]:
        """Begins a block, unless one of this kind is open."""
        content = self._message.content
        if self._texts is not None and type(content[-1]) is type(block):
            return
        yield from self._close()
        self._texts = []
        content.append(block)
        yield ContentBlockStart(len(content) - 1, block)

    def _more(self, text: str, delta: BlockDelta) -> MessageEvent:
        assert self._texts is not None
        self._texts.append(text)
        return ContentBlockDelta(len(self._message.content) - 1, delta)

    def _close(self) -> Iterator[MessageEvent]:
        if self._texts is None:
            return
        content, text = self._message.content, "".join(self._texts)
        self._texts = None
        index, block = len(content) - 1, content[-1]
        if isinstance(block, AnswerThinking):
            signature = self._message.id  # clients keep no thinking that has none
            yield ContentBlockDelta(index, SignatureDelta(signature))
            content[-1] = AnswerThinking(text, signature)
        elif isinstance(block, AnswerToolUse):
            content[-1] = AnswerToolUse(block.id, block.name, msgspec.Raw(text.encode()))
        else:
            content[-1] = AnswerText(text)
        yield ContentBlockStop(index)

    def _reason(self, completion: Completion) -> StopReason:
        if completion.finish_reason == "length":
            full = completion.usage.completion_tokens < self._max_tokens
            return "model_context_window_exceeded" if full else "max_tokens"
        if self._message.stop_sequence is not None:
            return "stop_sequence"
        called = any(isinstance(block, AnswerToolUse) for block in self._message.content)
        return "tool_use" if called else "end_turn"
