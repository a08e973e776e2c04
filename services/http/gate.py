"""What every request passes on its way to the application, as ASGI middleware."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm.services.http.error_responses import error_response
from nanovllm.services.http.errors import ApiError

log = logging.getLogger(__name__)

# What needs no key, nor do the files of the page.
PROBES: Final = ("/health", "/ready")
OPEN_PATHS: Final = re.compile("/|/page/.*|" + "|".join(PROBES))
# What machines and pages ask all the time: logged as debug output.
QUIET_PATHS: Final = re.compile("/page/.*|/pipeline|/metrics|" + "|".join(PROBES))
# Until the body of a request is there.
BODY_S: Final = 60.0
LOGGED_PATH: Final = 200
_REQUEST_ID: Final = re.compile(r"[\w.-]{1,128}", re.ASCII)


class RequestLog:
    """Names each request, by `x-request-id` of the request or anew, in the response and in the one
    line that the request has in the log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.monotonic()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope["state"]["request_id"] = request_id
        status = 0
        written = False

        async def send_named(message: Message) -> None:
            nonlocal status, written
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = request_id
            elif not message.get("more_body"):
                written = True
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        finally:
            log.log(
                logging.DEBUG if QUIET_PATHS.fullmatch(scope["path"]) else logging.INFO,
                "%s %s %s: %s%s in %.3f s, for %s",
                request_id,
                scope["method"],
                scope["raw_path"][:LOGGED_PATH].decode("ascii", "backslashreplace"),
                status or "no answer",
                "" if written or not status else ", not to its end",
                time.monotonic() - start,
                scope["state"].get("client_name", "unknown"),
            )


class Guard:
    """Lets in requests that have a key, in time and not too large; none while the pipeline drains.

    Puts `client_name` into a request's `scope["state"]`: the hash of its key, else its address.

    Args:
        app: gets the requests that are let in, each with its whole body in one message.
        keys: one of them is needed; none if there are none.
        max_body_bytes: a larger body is refused.

    Attributes:
        draining: whether new requests are refused.
        running: requests that were let in, and whose response is not written.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], max_body_bytes: int) -> None:
        self.draining = False
        self.running = 0
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["client_name"] = scope["client"][0] if scope["client"] else "unknown"
        try:
            if self._digests and not OPEN_PATHS.fullmatch(scope["path"]):
                scope["state"]["client_name"] = self._key_name(scope)
            if self.draining and (scope["method"] == "POST" or scope["path"] == "/ready"):
                message = "the server is shutting down; try again"
                raise ApiError(503, message, code="shutting_down")
            body = await self._body(scope, receive)
        except ApiError as error:
            response = error_response(error, scope)
            if error.status == 401:
                response.headers["www-authenticate"] = "Bearer"
            elif error.status == 408:
                response.headers["connection"] = "close"
            await response(scope, receive, send)
            return
        if body is None:
            return
        self.running += 1
        try:
            await self._app(scope, _replay(body, receive), send)
        finally:
            self.running -= 1

    def _key_name(self, scope: Scope) -> str:
        """Raises ApiError if the request has no key."""
        headers = Headers(scope=scope)
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        key = bearer if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        # Every comparison is made, so that the time says nothing.
        if not sum(hmac.compare_digest(digest, one) for one in self._digests):
            message = (
                "no valid API key: send one of the server's as `Authorization: Bearer …`"
                " or as `x-api-key: …`"
            )
            raise ApiError(401, message, code="invalid_api_key")
        return f"key {digest.hex()[:16]}"

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if the client leaves before it is there.

        Raises ApiError if it is too large, or does not come.
        """
        too_large = ApiError(413, f"the body has more than {self._max_body_bytes} bytes")
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdigit() or int(length) > self._max_body_bytes:
            raise too_large
        chunks: list[bytes] = []
        left = self._max_body_bytes
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk: bytes = message["body"]
                    chunks.append(chunk)
                    left -= len(chunk)
                    if left < 0:
                        raise too_large
                    if not message["more_body"]:
                        return b"".join(chunks)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {BODY_S:g} s") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """Receives `body`, then what `receive` does."""
    taken = False

    async def replayed() -> Message:
        nonlocal taken
        if taken:
            return await receive()
        taken = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
