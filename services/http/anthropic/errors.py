"""Errors as Anthropic's clients read them."""

from __future__ import annotations

from typing import Final

from nanovllm.services.http.anthropic.answers import MessageError, MessageErrorAnswer
from nanovllm.services.http.errors import ApiError

OVERLOADED: Final = 529
_TYPES: Final = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    OVERLOADED: "overloaded_error",
}


def status_of(error: ApiError) -> int:
    return OVERLOADED if error.body.code == "overloaded" else error.status


def message_error(error: ApiError, request_id: str) -> MessageErrorAnswer:
    status, message = status_of(error), error.body.message
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    if error.body.code == "context_length_exceeded":
        message = f"prompt is too long: {message}"  # agents look for these words
    return MessageErrorAnswer(MessageError(kind, message), request_id)
