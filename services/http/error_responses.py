"""Errors as responses: each API has a form of its own."""

from __future__ import annotations

from typing import Final

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from nanovllm.services.http.anthropic.errors import message_error, status_of
from nanovllm.services.http.errors import TOO_DEEP, ApiError, ErrorAnswer

RETRY_AFTER_S: Final = "1"
# The paths of Anthropic's API.
ANTHROPICS: Final = "/v1/messages"


def error_response(error: ApiError, scope: Scope) -> Response:
    """The error in the form of the API that the request is for."""
    headers = {"retry-after": RETRY_AFTER_S} if error.status in (429, 503) else None
    if scope["path"].startswith(ANTHROPICS):
        content = msgspec.json.encode(message_error(error, request_id(scope)))
        return Response(content, status_of(error), headers, "application/json")
    content = msgspec.json.encode(ErrorAnswer(error.body))
    return Response(content, error.status, headers, "application/json")


def request_id(scope: Scope) -> str:
    """What the log calls the request."""
    return str(scope.get("state", {}).get("request_id", ""))


async def on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error, request.scope)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, no such method, too large a body."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    message = {
        404: f"there is no {request.url.path}; /openapi.json lists what there is",
        405: f"{where}: the method is not allowed here",
    }.get(error.status_code, error.detail)
    response = error_response(ApiError(error.status_code, message), request.scope)
    response.headers.update(error.headers or {})
    return response


async def on_recursion(request: Request, _: Exception) -> Response:
    """What was decoded cannot be written again, a few levels deeper."""
    return error_response(ApiError(400, TOO_DEEP), request.scope)


async def on_client_gone(_: Request, __: Exception) -> Response:
    """The status is for the log alone: nobody reads it."""
    return Response(status_code=499)


async def on_exception(request: Request, error: Exception) -> Response:
    """A mistake in the door; Starlette logs the exception."""
    message = "the server failed: its log says how"
    return error_response(ApiError(500, message, code="internal"), request.scope)
