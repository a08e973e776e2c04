"""The door's part of traces: the span `door`, and what requests say of traces and timings."""

from __future__ import annotations

import re
import time
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm.protocol import TRACEPARENT
from nanovllm.tracing import Span, Tracer, child_of

# What an answer's `usage` has `timings` for.
TIMINGS_HEADER: Final = "x-nanovllm-timings"
_VERSION: Final = re.compile(r"[0-9a-f]{2}")
_PATH_CHARACTERS: Final = 80  # of the longest path in a span: no path of the API is longer
_KNOWN_CHARACTERS: Final = 55  # that a later version of `traceparent` begins with


class TracedDoor:
    """Gives each request of the API a span, `door`, from its headers to the end of its response."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        start_ns = time.monotonic_ns()
        given = Headers(scope=scope).getlist("traceparent")
        parent = self._tracer.parent(valid_traceparent(given[0]) if len(given) == 1 else None)
        context = child_of(parent)
        scope["state"]["traceparent"] = context.traceparent
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            if parent.sampled:
                attributes: dict[str, str | int] = {
                    "http.request.method": scope["method"],
                    "url.path": scope["path"][:_PATH_CHARACTERS],
                    "http.response.status_code": status,
                    "nanovllm.request_id": scope["state"]["request_id"],
                }
                error = None if 0 < status < 500 else f"status {status}" if status else "no answer"
                times = start_ns, time.monotonic_ns()
                span = Span("door", context, parent.span_id, *times, attributes, error, True)
                self._tracer.add([span])


def valid_traceparent(header: str) -> str | None:
    """The header as version 00; None if it is none. As W3C's Trace Context says, a later version is
    read as far as 00 goes."""
    version, known = header[:2], header[:_KNOWN_CHARACTERS]
    later = _VERSION.fullmatch(version) and version not in ("00", "ff")
    if later and header[_KNOWN_CHARACTERS:][:1] in ("", "-"):
        header = f"00{known[2:]}"
    return header if TRACEPARENT.fullmatch(header) else None


def asked_of(request: Request) -> dict[str, Any]:
    """The keys of `Generate` that headers say."""
    return {
        "traceparent": request.scope.get("state", {}).get("traceparent"),
        "timings": request.headers.get(TIMINGS_HEADER, "0") != "0",
    }
