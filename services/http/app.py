"""The HTTP application: its routes."""

from __future__ import annotations

import time

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nanovllm import __version__
from nanovllm.client.results import PipelineUnavailable
from nanovllm.services.http.context import DoorContext
from nanovllm.services.http.errors import (
    ApiError,
    api_error,
    on_api_error,
    on_exception,
    on_http_exception,
)
from nanovllm.services.http.responses import Model, ModelList, Version


def make_app(context: DoorContext) -> Starlette:
    """The application that serves `context`'s model.

    It runs in the event loop of the context's client.
    """
    model = context.model
    card = Model(id=model.name, created=int(time.time()), max_model_len=model.max_model_len)

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

    async def models(_: Request) -> Response:
        return json_response(ModelList([card]))

    async def one_model(request: Request) -> Response:
        check_model(request.path_params["id"], model.name)
        return json_response(card)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/ready", ready),
            Route("/version", version),
            Route("/v1/models", models),
            Route("/v1/models/{id:path}", one_model),
        ],
        exception_handlers={
            ApiError: on_api_error,
            HTTPException: on_http_exception,
            Exception: on_exception,
        },
    )


def check_model(asked: str, served: str) -> None:
    """Raises ApiError unless the model asked for is the one that is served."""
    if asked != served:
        message = f"there is no model {asked!r} here; {served!r} is served"
        raise ApiError(404, message, "model", "model_not_found")


def json_response(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
