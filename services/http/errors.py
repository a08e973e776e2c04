"""Errors, and what they are to OpenAI's clients."""

from __future__ import annotations

import re
from typing import Final

import msgspec
from starlette.responses import Response

from nanovllm.client.results import PipelineUnavailable, RequestError
from nanovllm.protocol import ErrorCode

# The key that a message of the pipeline begins with.
_KEY: Final = re.compile(
    r"((?:messages|tools|chat_template_kwargs|stop_token_ids|logit_bias|min_tokens|bad_words"
    r"|allowed_token_ids|ignore_eos|response_format|structured_outputs|guided_\w+|prompt)"
    r"[\w.\[\]]*): "
)
_TOOL_LINE: Final = re.compile(r"^tools: at (\d+)\(\d+\): (failed to compile JSON schema: )?")

TOO_DEEP: Final = "the body is nested too deeply"
# The session is that of this server, which has many clients.
_FULL: Final = re.compile(r"of .* are held, .* for this session; try later")


class ErrorBody(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(msgspec.Struct):
    error: ErrorBody


class ApiError(Exception):
    """Ends a request with this status.

    Args:
        param: the key of the request that is at fault.
        code: for programs; the pipeline's own codes, `model_not_found` and the like.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(message, _type(status), param, code)


_STATUS_OF: Final[dict[ErrorCode, int]] = {
    "invalid_request": 400,
    "context_length_exceeded": 400,
    "overloaded": 429,
    "shutting_down": 503,
    "poisoned": 500,
    "duplicate_id": 500,  # ids are the client library's: never the HTTP client's fault
    "internal": 500,
}


def api_error(
    error: RequestError | PipelineUnavailable, answer_key: str = "structured_outputs"
) -> ApiError:
    """
    Args:
        answer_key: the key of the request that is `structured_outputs` to the pipeline.
    """
    if isinstance(error, PipelineUnavailable):
        return ApiError(503, "the pipeline does not answer; try again", code="unavailable")
    message = error.message.removeprefix("sampling.").removeprefix("sampling: ")
    if message.startswith("prompt_token_ids: "):
        message = message.replace("prompt_token_ids", "prompt", 1)  # over HTTP one key has both
    if message.startswith("structured_outputs: "):
        message = message.replace("structured_outputs", answer_key, 1)
        message = _TOOL_LINE.sub(_tool_at, message)
    if _FULL.fullmatch(message):
        message = "the server holds as many requests as it may; try again later"
    found = _KEY.match(message)
    key = answer_key if message.startswith(f"{answer_key}: ") else found and found[1]
    return ApiError(_STATUS_OF[error.code], message, key, error.code)


def _tool_at(found: re.Match[str]) -> str:
    """Which tool an error in the grammar is about. The grammar begins with two lines for each tool,
    see `constraints`."""
    return f"tools: the parameters of tools[{(int(found[1]) - 1) // 2}]: "


def check_model(asked: str, served: str) -> None:
    """Raises ApiError unless the model asked for is the one that is served."""
    if asked != served:
        message = f"there is no model {asked!r} here; {served!r} is served"
        raise ApiError(404, message, "model", "model_not_found")


def json_response(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _type(status: int) -> str:
    names = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    return names.get(status, "invalid_request_error" if status < 500 else "server_error")
