"""The page at `/`: its files, the pipeline's status, and the kill of a service."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from nanovllm.control import Status
from nanovllm.names import ServiceId
from nanovllm.services.http.errors import ApiError
from nanovllm.services.http.page.access import Access
from nanovllm.services.http.page.feed import Feed
from nanovllm.services.http.parsing import Keys, parse

PAGE_PATHS: Final = re.compile("/|/page/.*|/pipeline(/.*)?")
_FILES: Final = Path(__file__).with_name("static")
_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS: Final = {
    "content-security-policy": "default-src 'self'; object-src 'none'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
# What stands in the HTML for the token of this launch.
_TOKEN: Final = b"{{token}}"


class Kill(Keys, forbid_unknown_fields=True):
    """The body of POST /pipeline/kill: the service, as the status names it."""

    role: str
    index: int
    engine: int


def page_routes(
    access: Access,
    feed: Feed,
    ask: Callable[[], Awaitable[Status]],
    kill: Callable[[ServiceId], bool],
    me: ServiceId,
) -> list[Route]:
    """
    Args:
        ask: tells the status; raises ApiError if the supervisor does not answer.
        kill: asks the supervisor to; returns False if it cannot be asked now.
        me: this HTTP server.
    """
    files = {path.name: path.read_bytes() for path in _FILES.iterdir() if path.suffix in _TYPES}
    page = files.pop("index.html")

    async def index(request: Request) -> Response:
        scope = request.scope
        token = access.token_for(request.headers.get("host", ""), scope["server"], scope["scheme"])
        headers = {**_HEADERS, "cache-control": "no-store"}
        return Response(page.replace(_TOKEN, token.encode()), 200, headers, _TYPES[".html"])

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in files:
            raise ApiError(404, f"the page has no {name}")
        headers = {**_HEADERS, "cache-control": "no-cache"}
        return Response(files[name], 200, headers, _TYPES[Path(name).suffix])

    async def status(_: Request) -> Response:
        if feed.is_full:
            raise ApiError(503, "too many pages are open; close some", code="overloaded")
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(feed.events(), 200, headers, "text/event-stream")

    async def end_me() -> None:
        """Has this server killed, once the answer is sent: a browser that gets none asks again."""
        await asyncio.sleep(0)  # the event loop writes to the socket meanwhile
        kill(me)

    async def killed(request: Request) -> Response:
        access.check(request.headers, request.scope["server"], request.scope["scheme"])
        asked = parse(await request.body(), Kill)
        service = ServiceId(asked.role, asked.index, asked.engine)
        states = {one.service: one.state for one in (await ask()).services}
        if service not in states:
            raise ApiError(404, f"there is no {service}")
        if states[service] != "ready":
            raise ApiError(409, f"{service} is {states[service]}: wait until it is ready")
        if me.machine not in (0, service.machine):
            raise ApiError(409, "only pages of the main machine reach services of others")
        if service == me:
            return Response(status_code=202, background=BackgroundTask(end_me))
        if not kill(service):
            raise ApiError(503, "the supervisor cannot be asked; try again", code="unavailable")
        return Response(status_code=202)

    return [
        Route("/", index),
        Route("/page/{name}", file),
        Route("/pipeline", status),
        Route("/pipeline/kill", killed, methods=["POST"]),
    ]
