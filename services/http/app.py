"""The HTTP application: its routes."""

from __future__ import annotations

import time

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from nanovllm import __version__
from nanovllm.client.results import PipelineUnavailable
from nanovllm.services.http.anthropic.messages import count_tokens, messages
from nanovllm.services.http.calls import ClientGone
from nanovllm.services.http.context import DoorContext
from nanovllm.services.http.error_responses import (
    on_api_error,
    on_client_gone,
    on_exception,
    on_http_exception,
    on_recursion,
)
from nanovllm.services.http.errors import ApiError, api_error, check_model, json_response
from nanovllm.services.http.openai.answers import Model, ModelList, Version
from nanovllm.services.http.openai.chat import chat
from nanovllm.services.http.openai.completions import complete
from nanovllm.services.http.openai.responses.responses import responses
from nanovllm.services.http.openapi import openapi
from nanovllm.services.http.tokens import PromptTokens


def make_app(context: DoorContext) -> Starlette:
    """The application that serves `context`'s model.

    It runs in the event loop of the context's client.
    """
    model = context.model
    card = Model(id=model.name, created=int(time.time()), max_model_len=model.max_model_len)

    tokens = PromptTokens(model)
    description = msgspec.json.encode(openapi())

    async def health(_: Request) -> Response:
        return Response()

    async def ready(_: Request) -> Response:
        try:
            pong = await context.client.ping()
        except PipelineUnavailable as error:
            raise api_error(error) from None
        if not pong.ready:
            raise ApiError(503, "the pipeline is not ready yet; try again", code="unavailable")
        return Response()

    async def version(_: Request) -> Response:
        return json_response(Version(__version__))

    async def described(_: Request) -> Response:
        return Response(description, media_type="application/json")

    async def models(_: Request) -> Response:
        return json_response(ModelList([card]))

    async def one_model(request: Request) -> Response:
        check_model(request.path_params["id"], model.name)
        return json_response(card)

    async def chat_completions(request: Request) -> Response:
        return await chat(request, context)

    async def answer_responses(request: Request) -> Response:
        return await responses(request, context)

    async def answer_messages(request: Request) -> Response:
        return await messages(request, context)

    async def count_message_tokens(request: Request) -> Response:
        return await count_tokens(request, context, tokens)

    async def completions(request: Request) -> Response:
        return await complete(request, context, tokens.ids)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/ready", ready),
            Route("/version", version),
            Route("/openapi.json", described),
            Route("/v1/models", models),
            Route("/v1/models/{id:path}", one_model),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/responses", answer_responses, methods=["POST"]),
            Route("/v1/messages", answer_messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", count_message_tokens, methods=["POST"]),
            Route("/tokenize", tokens.tokenize, methods=["POST"]),
            Route("/detokenize", tokens.detokenize, methods=["POST"]),
        ],
        exception_handlers={
            ApiError: on_api_error,
            HTTPException: on_http_exception,
            ClientGone: on_client_gone,
            ClientDisconnect: on_client_gone,
            RecursionError: on_recursion,
            Exception: on_exception,
        },
    )
