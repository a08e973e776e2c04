"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from functools import partial
from typing import Any

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from nanovllm.client.results import Completion, Delta
from nanovllm.messages import Chat
from nanovllm.protocol import Logprobs
from nanovllm.services.http.answers import AnswerReader, Piece, Reasoning, markers
from nanovllm.services.http.constraints import with_tools
from nanovllm.services.http.context import DoorContext, ServedModel
from nanovllm.services.http.conversation import Conversation
from nanovllm.services.http.errors import check_model, json_response
from nanovllm.services.http.openai.answers import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatFinishReason,
    FunctionCalled,
    PromptLogprobs,
    ToolCalled,
    usage_of,
)
from nanovllm.services.http.openai.chunks import Chunks
from nanovllm.services.http.openai.formats import NamedTool, asked_format
from nanovllm.services.http.openai.logprobs import chat_logprobs, prompt_logprobs
from nanovllm.services.http.openai.requests import (
    ChatRequest,
    TemplateKeys,
    asked_sampling,
    is_continued,
)
from nanovllm.services.http.parsing import parse
from nanovllm.services.http.streams import respond
from nanovllm.services.http.tool_calls import ToolCall


async def chat(request: Request, context: DoorContext) -> Response:
    """Answers a chat, whole or as a stream.

    Raises:
        ApiError: the request, or the pipeline's answer, is an error.
        ClientGone.
    """
    body = await request.body()
    ask = parse(body, ChatRequest)
    model = context.model
    check_model(ask.model, model.name)
    conversation = conversation_of(ask, body, model)
    choices = conversation.choices
    calls = conversation.begin(request, context, body)
    outputs = [ChatOutput(i, model, tools=conversation.has_tools) for i in range(choices)]
    answer_id, created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
    usage = partial(usage_of, choices=choices)

    def whole(completions: list[Completion]) -> Response:
        return json_response(
            ChatCompletion(
                id=answer_id,
                created=created,
                model=model.name,
                choices=[o.whole(c) for o, c in zip(outputs, completions, strict=True)],
                usage=usage([completion.usage for completion in completions]),
            )
        )

    return await respond(
        Chunks(
            ChatChunk(id=answer_id, created=created, model=model.name, choices=[]),
            usage if ask.include_usage else None,
        ),
        calls,
        outputs,
        context,
        whole,
        stream=conversation.stream,
        large=bool(ask.logprobs) or ask.prompt_logprobs is not None,
    )


def conversation_of(ask: ChatRequest, body: bytes, model: ServedModel) -> Conversation:
    """
    Args:
        body: what `ask` was parsed from.

    Raises ApiError if keys do not fit together.
    """
    messages, tools = template_keys(body)
    choice = ask.tool_choice
    answer = with_tools(
        asked_format(ask),
        [tool.function for tool in ask.tools or ()],
        choice.function if isinstance(choice, NamedTool) else choice,
        parallel=ask.parallel_tool_calls is not False,
    )
    asked_logprobs = (ask.top_logprobs or 0) if ask.logprobs else None
    max_tokens = ask.max_completion_tokens or ask.max_tokens
    return Conversation(
        chat=Chat(
            messages=messages,
            tools=tools if tools and choice != "none" else None,
            template_kwargs=ask.chat_template_kwargs or {},
            continue_final_message=is_continued(ask),
        ),
        sampling=asked_sampling(ask, model, max_tokens, asked_logprobs, answer.outputs),
        stream=bool(ask.stream),
        answer_key=answer.key,
        cache_salt=ask.cache_salt,
        choices=ask.n or 1,
    )


def template_keys(body: bytes) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """The messages and tools as they were sent, for the chat template, which may know more keys
    than we do. Templates do not know the role `developer`, which is a later word for `system`.

    Raises ApiError if what such a key has is not JSON, or too large a number.
    """
    keys = parse(body, TemplateKeys)
    for message in keys.messages:
        if message["role"] == "developer":
            message["role"] = "system"
    return keys.messages, keys.tools


class ChatOutput:
    """One choice of a chat.

    Args:
        tools: whether the output may hold tool calls.
    """

    def __init__(self, index: int, model: ServedModel, *, tools: bool) -> None:
        self._index = index
        self._token_text = model.token_text
        self._reader = AnswerReader(markers(model), tools=tools)
        self._tool_calls = 0  # that have begun
        self._called = False  # whether one is complete
        # Of tokens that no chunk was made of yet.
        self._logprobs: Logprobs = []
        self._prompt_logprobs: PromptLogprobs | UnsetType = UNSET

    def begin(self) -> list[ChatChunkChoice]:
        return [ChatChunkChoice(self._index, ChatDelta(role="assistant", content=""))]

    def news(self, delta: Delta) -> list[ChatChunkChoice]:
        self._take_prompt(delta)
        return self._chunks(self._reader.feed(delta.text, delta.answer_at), delta.logprobs)

    def end(self, completion: Completion) -> list[ChatChunkChoice]:
        chunks = self._chunks(self._reader.rest(), None)
        last = ChatChunkChoice(self._index, ChatDelta(), self._reason(completion))
        return self._with_logprobs([*chunks, last])

    def whole(self, completion: Completion) -> ChatChoice:
        pieces = self._reader.feed(completion.text, completion.answer_at) + self._reader.rest()
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
        whole = [piece for piece in pieces if isinstance(piece, ToolCall) and piece.complete]
        calls = [_called(call) for call in whole]
        self._called = bool(calls)
        self._take_prompt(completion)
        logprobs = completion.logprobs
        return ChatChoice(
            self._index,
            AssistantMessage(
                content=content if content or not calls else None,
                reasoning_content=reasoning or UNSET,
                tool_calls=calls or UNSET,
            ),
            self._reason(completion),
            None if logprobs is None else chat_logprobs(logprobs, self._token_text),
            self._prompt_logprobs,
        )

    def _take_prompt(self, output: Delta | Completion) -> None:
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = prompt_logprobs(output.prompt_logprobs, self._token_text)

    def _chunks(self, pieces: list[Piece], logprobs: Logprobs | None) -> list[ChatChunkChoice]:
        self._logprobs += logprobs or ()
        deltas: list[ChatDelta] = []
        for piece in pieces:
            if isinstance(piece, str):
                deltas.append(ChatDelta(content=piece))
            elif isinstance(piece, Reasoning):
                deltas.append(ChatDelta(reasoning_content=piece.text))
            else:
                deltas += self._tool_call(piece)
        return self._with_logprobs([ChatChunkChoice(self._index, delta) for delta in deltas])

    def _tool_call(self, call: ToolCall) -> list[ChatDelta]:
        """First the name, then the arguments."""
        self._called |= call.complete
        self._tool_calls += call.name is not None
        pieces = [call._replace(arguments="")] if call.name is not None else []
        pieces += [call._replace(name=None)] if call.arguments else []
        index = self._tool_calls - 1
        return [ChatDelta(tool_calls=[_called(piece, index)]) for piece in pieces]

    def _with_logprobs(self, chunks: list[ChatChunkChoice]) -> list[ChatChunkChoice]:
        if self._logprobs and chunks:
            chunks[0].logprobs = chat_logprobs(self._logprobs, self._token_text)
            self._logprobs = []
        if self._prompt_logprobs and chunks:
            chunks[0].prompt_logprobs = self._prompt_logprobs
            self._prompt_logprobs = UNSET
        return chunks

    def _reason(self, completion: Completion) -> ChatFinishReason:
        if completion.finish_reason == "length":
            return "length"
        return "tool_calls" if self._called else "stop"


def _called(call: ToolCall, index: int | UnsetType = UNSET) -> ToolCalled:
    if call.name is None:
        return ToolCalled(FunctionCalled(arguments=call.arguments), index=index)
    call_id = f"call_{secrets.token_hex(12)}"
    return ToolCalled(FunctionCalled(call.name, call.arguments), call_id, "function", index)
