"""An HTTP server's process: `python -m nanovllm.services.http`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Final, NoReturn

import msgspec
import uvicorn
import uvloop
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from nanovllm.api_keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from nanovllm.checkpoint import model_name
from nanovllm.checkpoint.generation import SamplingDefaults
from nanovllm.client.aio import AsyncClient
from nanovllm.control import Drain, FromSupervisor, Status
from nanovllm.service import (
    LISTENER_VARIABLE,
    PAGE_TOKEN_VARIABLE,
    TURN_S,
    Service,
    service_command,
)
from nanovllm.services.http.app import make_app
from nanovllm.services.http.context import DoorContext, ServedModel
from nanovllm.services.http.errors import ApiError
from nanovllm.services.http.exposition import CONTENT_TYPE, exposition
from nanovllm.services.http.gate import Guard, RequestLog
from nanovllm.services.http.limits import LimitedProtocol
from nanovllm.services.http.metrics import Recorder
from nanovllm.services.http.page.access import Access
from nanovllm.services.http.page.feed import Feed
from nanovllm.services.http.page.routes import PAGE_PATHS, page_routes
from nanovllm.services.http.tracing import TracedDoor
from nanovllm.settings import SettingsError
from nanovllm.tracing import Tracer, tracer_to
from nanovllm.transport.endpoints import host_and_port

# An ingress that hangs is found after 10 s, and may start for as long again: to HTTP clients all of
# that is a pause.
PATIENCE_S: Final = 60.0
# How long an idle connection is kept: longer than the minute of usual load balancers.
KEEP_ALIVE_S: Final = 75
STATUS_S: Final = 3.0
# At the end of a drain responses are written, and only connections are left to be closed.
CLOSING_S: Final = 1
# Collections of the middle generation before a full one: Logprobs that wait for slow clients are
# many objects.
FULL_COLLECTION: Final = 1000
# How long a thread that writes a large answer keeps the event loop waiting, each time.
SWITCH_S: Final = 0.0005


class Door:
    """The event loop of an HTTP server. The links of the service have a turn in it now and then, so
    that a loop that stands still gives no sign of life."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._recorder = Recorder()
        self._asked: list[asyncio.Future[Status]] = []
        self._feed = Feed(self._status)
        service.on_told(self._on_told)

    async def run(self) -> None:
        settings = self._service.settings
        listening = _inherited_socket()
        keys, admin_keys = _inherited_keys(API_KEY_VARIABLE), _inherited_keys(ADMIN_KEY_VARIABLE)
        access = Access(
            os.environ.pop(PAGE_TOKEN_VARIABLE),
            host_and_port(settings.http)[0],
            bool(keys),
            admin_keys,
        )
        model = ServedModel.from_checkpoint(
            self._service.directory,
            settings.served_model_name or model_name(self._service.directory),
            settings.max_model_len,
            generation_config=settings.generation_config == "auto",
        )
        async with AsyncClient(
            settings.ingress_endpoint, timeout=PATIENCE_S, keys=settings.keys
        ) as client:
            app = make_app(DoorContext(client, model, self._recorder))
            app.add_route("/metrics", self._metrics, ["GET"])
            kill, me = self._service.ask_kill, self._service.me.service
            app.routes.extend(page_routes(access, self._feed, self._status, kill, me))
            tracer = tracer_to(settings.otlp)
            self._guard = Guard(app, keys and keys + admin_keys, settings.max_message_bytes)
            LimitedProtocol.max_body_bytes = settings.max_message_bytes
            self._server = _Server(
                uvicorn.Config(
                    RequestLog(_with_cors(_traced(self._guard, tracer), settings.cors)),
                    http=LimitedProtocol,
                    ws="none",
                    lifespan="off",
                    interface="asgi3",
                    log_config=None,
                    access_log=False,
                    proxy_headers=False,
                    server_header=False,
                    ssl_certfile=settings.tls_certificate or None,
                    ssl_keyfile=settings.tls_key or None,
                    timeout_keep_alive=KEEP_ALIVE_S,
                    timeout_graceful_shutdown=int(settings.drain_timeout),
                )
            )
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._end)
            async with asyncio.TaskGroup() as group:
                turns = group.create_task(self._take_turns(model))
                await self._server.serve([listening])
                turns.cancel()

    async def _take_turns(self, model: ServedModel) -> None:
        ready = False
        while True:
            self._service.turn(self._recorder.stats)
            if self._server.started and not ready:
                ready = True
                self._service.ready(_told(model.defaults))
            if self._guard.draining and self._written():
                self._service.drained()
            await asyncio.sleep(TURN_S)

    def _on_told(self, message: FromSupervisor) -> None:
        if isinstance(message, Drain):
            self._guard.draining = True
            self._feed.close()
            self._server.config.timeout_graceful_shutdown = CLOSING_S
        elif isinstance(message, Status):
            for asked in self._asked:
                if not asked.done():
                    asked.set_result(message)
            self._asked.clear()

    def _end(self) -> None:
        """Takes no more connections, and ends with the last response."""
        self._feed.close()
        self._server.should_exit = True

    def _written(self) -> bool:
        """Whether every response is written."""
        connections = self._server.server_state.connections
        return not self._guard.running and not any(
            connection.transport.get_write_buffer_size() for connection in connections
        )

    async def _metrics(self, _: Request) -> Response:
        return Response(exposition(await self._status()), media_type=CONTENT_TYPE)

    async def _status(self) -> Status:
        """What the supervisor tells. Raises ApiError if it does not answer."""
        asked: asyncio.Future[Status] = asyncio.get_running_loop().create_future()
        self._asked.append(asked)
        if len(self._asked) == 1 and not self._service.ask_status():
            self._asked.clear()
            raise ApiError(503, "the supervisor cannot be asked; try again", code="unavailable")
        try:
            return await asyncio.wait_for(asked, STATUS_S)
        except TimeoutError:
            raise ApiError(503, "the supervisor does not answer", code="unavailable") from None
        finally:
            if asked in self._asked:
                self._asked.remove(asked)
                if self._asked:  # the answer may be lost: who came later has time for another
                    self._service.ask_status()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to `Door`."""
        yield


def _inherited_socket() -> socket.socket:
    descriptor = os.environ.pop(LISTENER_VARIABLE, None)
    if descriptor is None:
        raise SettingsError("an HTTP server gets its socket from nanovllm-launch --http HOST:PORT")
    return socket.socket(fileno=int(descriptor))


def _inherited_keys(variable: str) -> list[str]:
    return [key for key in os.environ.pop(variable, "").split(",") if key]


def _told(defaults: SamplingDefaults) -> str:
    """How requests are sampled that do not say; empty if the checkpoint does not say either."""
    values = msgspec.structs.asdict(defaults).items()
    said = ", ".join(f"{name} {value:g}" for name, value in values if value is not None)
    return said and f"generation_config.json's {said}, unless a request says otherwise"


def _traced(app: ASGIApp, tracer: Tracer | None) -> ASGIApp:
    return app if tracer is None else TracedDoor(app, tracer)


def _with_cors(app: ASGIApp, origins: str) -> ASGIApp:
    allowed = [origin.strip() for origin in origins.split(",") if origin.strip()]
    if not allowed:
        return app
    opened = CORSMiddleware(
        app,
        allow_origins=allowed,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "request-id", "retry-after"],
    )

    async def with_cors(scope: Scope, receive: Receive, send: Send) -> None:
        # The page has a token: it is for nobody else to read.
        await (app if PAGE_PATHS.fullmatch(scope["path"]) else opened)(scope, receive, send)

    return with_cors


def serve(service: Service) -> NoReturn:
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is a file
    # Full collections stop the event loop: they are for the few cycles that live long.
    gc.set_threshold(*gc.get_threshold()[:2], FULL_COLLECTION)
    sys.setswitchinterval(SWITCH_S)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(Door(service).run())
    sys.exit(0)


if __name__ == "__main__":
    service_command("http", serve)()
