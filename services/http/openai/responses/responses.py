"""POST /v1/responses. Nothing is kept: each request has its whole conversation."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from nanovllm.client.results import Completion, Delta, Usage
from nanovllm.services.http.answers import AnswerReader, Piece, Reasoning, markers
from nanovllm.services.http.context import DoorContext, ServedModel
from nanovllm.services.http.conversation import Conversation
from nanovllm.services.http.errors import ApiError, check_model, json_response
from nanovllm.services.http.openai.formats import TextFormat
from nanovllm.services.http.openai.responses.answers import (
    EventType,
    FunctionCallItem,
    IncompleteDetails,
    ItemStatus,
    MessageItem,
    OutputItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseAnswer,
    ResponseError,
    ResponseEvent,
    usage_of,
)
from nanovllm.services.http.openai.responses.requests import (
    ReasoningConfig,
    ResponsesRequest,
    TextConfig,
    conversation_of,
)
from nanovllm.services.http.parsing import parse
from nanovllm.services.http.streams import respond
from nanovllm.services.http.tool_calls import ToolCall

_encode = msgspec.json.Encoder().encode


async def responses(request: Request, context: DoorContext) -> Response:
    """Answers a conversation, whole or as a stream; raises what `chat` raises."""
    body = await request.body()
    ask = parse(body, ResponsesRequest)
    check_model(ask.model, context.model.name)
    conversation = conversation_of(ask, context.model)
    calls = conversation.begin(request, context, body)
    output = ResponseOutput(ask, context.model, conversation)
    return await respond(
        output,
        calls,
        [output],
        context,
        lambda completions: json_response(output.whole(completions[0])),
        stream=conversation.stream,
    )


class ResponseOutput:
    """A response, as its items, and how its events are written.

    A call that breaks, or that `max_output_tokens` ends, is an item whose status is incomplete, and
    the text of a message too: a stream has begun to give the call before that was known.
    """

    waiting: Final = b": waiting\n\n"

    def __init__(
        self, ask: ResponsesRequest, model: ServedModel, conversation: Conversation
    ) -> None:
        self._reader = AnswerReader(markers(model), tools=conversation.has_tools)
        self._reasoning = model.reasoning
        self._events = 0  # that were made
        self._texts: list[str] | None = None  # of the item that is open
        self._answer = _begun(ask, model, conversation)

    def begin(self) -> list[ResponseEvent]:
        kinds: tuple[EventType, ...] = ("response.created", "response.in_progress")
        return [self._event(kind, response=self._answer) for kind in kinds]

    def news(self, delta: Delta) -> list[ResponseEvent]:
        return list(self._take(self._reader.feed(delta.text, delta.answer_at)))

    def end(self, completion: Completion) -> list[ResponseEvent]:
        answer = self._answer
        complete = completion.finish_reason != "length"
        status: ItemStatus = "completed" if complete else "incomplete"
        events = [*self._take(self._reader.rest()), *self._close(status)]
        if not answer.output:
            events += [*self._open(MessageItem(_id("msg"), [], "in_progress")), *self._close()]
        answer.usage = usage_of(completion, self._reasoning)
        if complete:
            answer.status, answer.completed_at = "completed", int(time.time())
            return [*events, self._event("response.completed", response=answer)]
        answer.status, answer.incomplete_details = "incomplete", IncompleteDetails()
        return [*events, self._event("response.incomplete", response=answer)]

    def whole(self, completion: Completion) -> ResponseAnswer:
        self.news(Delta(completion.text, [], None, completion.answer_at))
        self.end(completion)
        self._answer.output = [
            item
            for item in self._answer.output
            if not isinstance(item, FunctionCallItem) or item.status == "completed"
        ]
        return self._answer

    def event(self, made: ResponseEvent) -> bytes:
        return b"event: " + made.type.encode() + b"\ndata: " + _encode(made) + b"\n\n"

    def last(self, usages: list[Usage]) -> bytes:
        return b""  # the response has said its usage

    def failed(self, error: ApiError) -> bytes:
        self._answer.status = "failed"
        self._answer.error = ResponseError("server_error", error.body.message)
        return self.event(self._event("response.failed", response=self._answer))

    def _event(self, kind: EventType, **keys: Any) -> ResponseEvent:
        self._events += 1
        return ResponseEvent(type=kind, sequence_number=self._events - 1, **keys)

    def _take(self, pieces: list[Piece]) -> Iterator[ResponseEvent]:
        for piece in pieces:
            if isinstance(piece, ToolCall):
                yield from self._tool_call(piece)
            elif isinstance(piece, Reasoning):
                yield from self._open(ReasoningItem(_id("rs"), [], "in_progress"))
                yield self._more("response.reasoning_text.delta", piece.text, content_index=0)
            else:
                yield from self._open(MessageItem(_id("msg"), [], "in_progress"))
                yield self._more("response.output_text.delta", piece, content_index=0, logprobs=[])

    def _tool_call(self, call: ToolCall) -> Iterator[ResponseEvent]:
        if call.name is not None:
            yield from self._close()
            item = FunctionCallItem(_id("fc"), _id("call"), call.name, "", "in_progress")
            yield from self._open(item)
        if call.arguments:
            yield self._more("response.function_call_arguments.delta", call.arguments)
        if call.complete:
            yield from self._close(called=True)

    def _open(self, item: OutputItem) -> Iterator[ResponseEvent]:
        """Begins an item, unless one of this kind is open."""
        output = self._answer.output
        if self._texts is not None and type(output[-1]) is type(item):
            return
        yield from self._close()
        self._texts = []
        output.append(item)
        yield self._event("response.output_item.added", output_index=len(output) - 1, item=item)
        if not isinstance(item, FunctionCallItem):
            yield self._of_item(
                "response.content_part.added", content_index=0, part=_part(item, "")
            )

    def _more(self, kind: EventType, text: str, **keys: Any) -> ResponseEvent:
        assert self._texts is not None
        self._texts.append(text)
        return self._of_item(kind, delta=text, **keys)

    def _close(self, status: ItemStatus = "completed", *, called: bool = False) -> Iterator[Any]:
        """Ends the item that is open, if one is.

        Args:
            called: whether that is a call that is complete.
        """
        if self._texts is None:
            return
        output, text = self._answer.output, "".join(self._texts)
        self._texts = None
        item = output[-1]
        if isinstance(item, FunctionCallItem):
            status = "completed" if called else "incomplete"
            item = FunctionCallItem(item.id, item.call_id, item.name, text, status)
            if called:
                kind: EventType = "response.function_call_arguments.done"
                yield self._of_item(kind, name=item.name, arguments=text)
        else:
            part = _part(item, text)
            if isinstance(part, ReasoningText):
                item = ReasoningItem(item.id, [part], status)
                yield self._of_item("response.reasoning_text.done", content_index=0, text=text)
            else:
                item = MessageItem(item.id, [part], status)
                kind = "response.output_text.done"
                yield self._of_item(kind, content_index=0, text=text, logprobs=[])
            yield self._of_item("response.content_part.done", content_index=0, part=part)
        output[-1] = item
        yield self._event("response.output_item.done", output_index=len(output) - 1, item=item)

    def _of_item(self, kind: EventType, **keys: Any) -> ResponseEvent:
        """An event of the latest item."""
        output = self._answer.output
        return self._event(kind, output_index=len(output) - 1, item_id=output[-1].id, **keys)


def _part(item: OutputItem, text: str) -> OutputText | ReasoningText:
    return ReasoningText(text) if isinstance(item, ReasoningItem) else OutputText(text)


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"


def _begun(ask: ResponsesRequest, model: ServedModel, conversation: Conversation) -> ResponseAnswer:
    params = conversation.sampling
    text = ask.text or TextConfig()
    return ResponseAnswer(
        id=_id("resp"),
        created_at=int(time.time()),
        model=model.name,
        output=[],
        instructions=ask.instructions,
        max_output_tokens=ask.max_output_tokens,
        tools=ask.tools or [],
        tool_choice=ask.tool_choice or "auto",
        parallel_tool_calls=ask.parallel_tool_calls is not False,
        text=TextConfig(text.format or TextFormat(), "medium"),
        reasoning=ask.reasoning or ReasoningConfig(),
        temperature=params.temperature,
        top_p=params.top_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        metadata=ask.metadata or {},
        user=ask.user,
        safety_identifier=ask.safety_identifier,
        prompt_cache_key=ask.prompt_cache_key,
    )
