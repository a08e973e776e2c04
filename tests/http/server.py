"""The HTTP application in a thread of the test's process, and a plain client of it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import uvicorn
import uvloop

from nanovllm.checkpoint import DEMO_CHECKPOINT
from nanovllm.client.aio import AsyncClient
from nanovllm.services.http.app import make_app
from nanovllm.services.http.context import DoorContext, ServedModel
from nanovllm.services.http.gate import Guard, RequestLog
from nanovllm.services.http.limits import LimitedProtocol

# Long enough for an answer as long as a context, on a machine whose cores are busy.
TIMEOUT_S = 180.0
HELLO = [{"role": "user", "content": "hello"}]


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[dict[str, Any]]:
        """What the events of a stream hold, whose names are those of their data."""
        events: list[dict[str, Any]] = []
        for event in self.body.decode().strip().split("\n\n"):
            name, data = event.split("\n")
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
        return events

    @property
    def chunks(self) -> list[Any]:
        """What the events of a stream hold, but for the last, which is `[DONE]`."""
        events = [line[6:] for line in self.body.decode().split("\n\n") if line[:6] == "data: "]
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]


class Server:
    """A client of the server that listens at `port` of 127.0.0.1.

    Args:
        port: where.
        headers: sent with every request.
    """

    def __init__(self, port: int, headers: Mapping[str, str] | None = None) -> None:
        self.port = port
        self._headers = headers or {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """
        Args:
            body: what JSON can say, or bytes as they are.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        try:
            raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, raw, {**self._headers, **(headers or {})})
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.ask("GET", path)

    def post(self, path: str, body: Any) -> Answer:
        return self.ask("POST", path, body)

    def chat(self, **keys: Any) -> Answer:
        return self.post("/v1/chat/completions", {"model": "demo", "messages": HELLO, **keys})

    def complete(self, **keys: Any) -> Answer:
        return self.post("/v1/completions", {"model": "demo", **keys})

    def send(self, path: str, body: Any) -> socket.socket:
        """Sends a request, and leaves its answer to be read."""
        raw = json.dumps(body).encode()
        named = {"Host": "x", "Content-Length": str(len(raw)), **self._headers}
        lines = [f"{name}: {value}\r\n" for name, value in named.items()]
        head = f"POST {path} HTTP/1.1\r\n{''.join(lines)}\r\n"
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(TIMEOUT_S)
        connection.connect(("127.0.0.1", self.port))
        connection.sendall(head.encode() + raw)
        return connection


@contextlib.contextmanager
def serving(
    endpoint: str,
    *,
    takes_nothing_s: float = 30.0,
    timeout: float = 10.0,
    max_body_bytes: int = 64 << 20,
) -> Iterator[Server]:
    """Serves the pipeline at `endpoint`, as the demo model."""
    model = ServedModel.from_checkpoint(DEMO_CHECKPOINT, "demo", 4096)
    listening = socket.create_server(("127.0.0.1", 0))
    loop = uvloop.new_event_loop()
    stopping = asyncio.Event()

    class Protocol(LimitedProtocol):
        pass

    Protocol.takes_nothing_s = takes_nothing_s
    Protocol.max_body_bytes = max_body_bytes

    async def serve() -> None:
        async with AsyncClient(endpoint, timeout) as client:
            app = make_app(DoorContext(client, model))
            config = uvicorn.Config(
                RequestLog(Guard(app, [], max_body_bytes)),
                http=Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
            )
            server = uvicorn.Server(config)
            running = asyncio.create_task(server.serve([listening]))
            await stopping.wait()
            server.should_exit = server.force_exit = True
            await running

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        yield Server(listening.getsockname()[1])
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join(TIMEOUT_S)
        loop.close()
        listening.close()
