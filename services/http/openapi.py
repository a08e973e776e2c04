"""/openapi.json, written from the structs of requests and answers."""

from __future__ import annotations

from typing import Any, Final, NamedTuple, get_args

import msgspec

from nanovllm import __version__
from nanovllm.services.http.anthropic.answers import (
    MessageAnswer,
    MessageErrorAnswer,
    MessageEvent,
    TokenCount,
)
from nanovllm.services.http.anthropic.errors import OVERLOADED
from nanovllm.services.http.anthropic.requests import CountRequest, MessagesRequest
from nanovllm.services.http.errors import ErrorAnswer
from nanovllm.services.http.openai.answers import (
    ChatChunk,
    ChatCompletion,
    Model,
    ModelList,
    Text,
    TextCompletion,
    Tokens,
    Version,
)
from nanovllm.services.http.openai.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from nanovllm.services.http.openai.responses.answers import ResponseAnswer, ResponseEvent
from nanovllm.services.http.openai.responses.requests import ResponsesRequest

_REFERENCE: Final = "#/components/schemas/{name}"

Struct = type[msgspec.Struct]


class _Operation(NamedTuple):
    """`chunk`: what a stream's events hold, one of them. `error`: the form of errors."""

    path: str
    summary: str
    answer: Struct | None
    request: Struct | None = None
    chunk: tuple[Struct, ...] = ()
    errors: tuple[int, ...] = ()
    error: Struct = ErrorAnswer


_ASKED: Final = (400, 404, 413, 429, 500, 503)
_OPERATIONS: Final = (
    _Operation("/health", "Whether this server is alive.", None),
    _Operation("/ready", "Whether the pipeline can start a request.", None, errors=(503,)),
    _Operation("/version", "The version of nanovllm.", Version),
    _Operation("/v1/models", "The model that is served.", ModelList),
    _Operation("/v1/models/{id}", "The model of this name.", Model, errors=(404,)),
    _Operation(
        *("/v1/chat/completions", "Answer a chat.", ChatCompletion, ChatRequest),
        *((ChatChunk,), _ASKED),
    ),
    _Operation(
        *("/v1/completions", "Continue prompts.", TextCompletion, CompletionRequest),
        *((TextCompletion,), _ASKED),
    ),
    _Operation(
        *("/v1/responses", "Answer a conversation.", ResponseAnswer, ResponsesRequest),
        *((ResponseEvent,), _ASKED),
    ),
    _Operation(
        *("/v1/messages", "Answer a conversation, as Anthropic's API does.", MessageAnswer),
        *(MessagesRequest, get_args(MessageEvent), (400, 404, 413, 500, 503, OVERLOADED)),
        MessageErrorAnswer,
    ),
    _Operation(
        *("/v1/messages/count_tokens", "The tokens of a conversation.", TokenCount, CountRequest),
        *((), (400, 404, 413), MessageErrorAnswer),
    ),
    _Operation(
        "/tokenize", "A prompt's token ids.", Tokens, TokenizeRequest, errors=(400, 404, 413)
    ),
    _Operation(
        "/detokenize", "The text of token ids.", Text, DetokenizeRequest, errors=(400, 404, 413)
    ),
)


def openapi() -> dict[str, Any]:
    """The OpenAPI description of all routes."""
    structs: set[Struct] = {
        struct
        for each in _OPERATIONS
        for struct in (each.answer, each.request, *each.chunk, each.error)
        if struct is not None
    }
    ordered = sorted(structs, key=lambda struct: struct.__name__)
    _, components = msgspec.json.schema_components(ordered, ref_template=_REFERENCE)
    return {
        "openapi": "3.1.0",
        "info": {"title": "nanovllm", "version": __version__},
        "paths": {operation.path: _path(operation) for operation in _OPERATIONS},
        "components": {
            "schemas": components,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"key": []}, {"header": []}],
    }


def _path(operation: _Operation) -> dict[str, Any]:
    success: dict[str, Any] = {"description": "Success"}
    if operation.answer is not None:
        success["content"] = _json(operation.answer)
    if operation.chunk:
        chunks = [_reference(struct) for struct in operation.chunk]
        success["content"]["text/event-stream"] = {
            "schema": {"type": "string"},
            "x-event-schema": chunks[0] if len(chunks) == 1 else {"anyOf": chunks},
        }
    errors = {
        str(status): {"description": "An error", "content": _json(operation.error)}
        for status in (401, *operation.errors)
    }
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {"200": success, **errors},
    }
    if operation.request is not None:
        described["requestBody"] = {"required": True, "content": _json(operation.request)}
    if "{id}" in operation.path:
        described["parameters"] = [
            {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return {"get" if operation.request is None else "post": described}


def _json(struct: Struct) -> dict[str, Any]:
    return {"application/json": {"schema": _reference(struct)}}


def _reference(struct: Struct) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(name=struct.__name__)}
