"""A load client of an OpenAI API: a pipeline's HTTP servers, or any other server."""

from __future__ import annotations

import asyncio
import resource
import signal
import ssl
import threading
from typing import Any, Final, NamedTuple, Self, cast
from urllib.parse import urlsplit

import httptools
import msgspec
import uvloop

from nanovllm.client.results import PipelineUnavailable
from nanovllm.protocol import (
    Delta,
    Error,
    ErrorCode,
    Finish,
    FinishReason,
    Generate,
    ServerMessage,
    Usage,
)
from nanovllm.timer import Timer

ONE_TOKEN: Final = [0]  # nobody says which

_encode = msgspec.json.Encoder().encode


class Url(NamedTuple):
    """An OpenAI client's base URL, as http://127.0.0.1:8000/v1."""

    text: str
    host: str
    port: int
    tls: bool
    path: str

    @classmethod
    def parse(cls, text: str) -> Url:
        """Raises ValueError if `text` is no such URL. Without a path, `/v1` is meant."""
        wrong = ValueError(f"--http {text!r} is no URL as http://127.0.0.1:8000/v1")
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError:
            raise wrong from None
        tls = parts.scheme == "https"
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise wrong
        path = parts.path.rstrip("/") or "/v1"
        port = port or (443 if tls else 80)
        return cls(f"{parts.scheme}://{parts.netloc}{path}", parts.hostname, port, tls, path)


class HttpClient:
    """Streams completions (of text and token ids) and chats, each over a connection of its own
    meanwhile; connections are kept.

    Events do not say how many tokens they hold. Each that has text counts as one token; the tokens
    that the usage has beyond come with the end.

    Args:
        key: the API key; empty for none.
    """

    def __init__(self, url: Url, model: str, key: str) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is a file
        self._url = url
        self._model = model
        host = url.text.split("/")[2]
        bearer = f"Authorization: Bearer {key}\r\n" if key else ""
        self._headers = f"Host: {host}\r\n{bearer}Content-Type: application/json\r\n"
        self._tls = ssl.create_default_context() if url.tls else None
        self._loop = uvloop.new_event_loop()
        self._timer = Timer()
        self._loop.add_reader(self._timer.descriptor, self._loop.stop)
        # uvloop would take a KeyboardInterrupt in a connection's callback for the connection's end,
        # and its own handlers lose signals that come between two runs of the loop.
        self._interrupted = False
        self._handles = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if self._handles:
            signal.signal(signal.SIGINT, self._interrupt)
        self._connecting: set[asyncio.Task[None]] = set()
        self._connections: set[_Connection] = set()
        self._idle: list[_Connection] = []
        self._came: list[ServerMessage] = []
        self._failure: PipelineUnavailable | None = None

    def submit(self, request: Generate) -> None:
        chat = request.messages is not None
        body = _encode(_asked(request, self._model))
        raw = (
            f"POST {self._url.path}/{'chat/' if chat else ''}completions HTTP/1.1\r\n"
            f"{self._headers}Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        if self._idle:
            self._idle.pop().ask(request.id, raw)
        else:
            self.connect(request.id, raw)

    def receive(self, until: float) -> list[ServerMessage]:
        if self._failure is None:
            self._timer.clear()
            self._timer.set(until)
            self._loop.run_forever()
        if self._interrupted:
            raise KeyboardInterrupt
        came, self._came = self._came, []
        if not came and self._failure is not None:
            raise self._failure
        return came

    def _interrupt(self, *_: object) -> None:
        self._interrupted = True
        self._loop.stop()

    def close(self) -> None:
        """Disconnects; the server then aborts what is unfinished."""
        self._loop.remove_reader(self._timer.descriptor)
        end = self._loop.create_task(self._end())
        while not end.done():  # it may have been told to stop once more
            self._loop.run_forever()
        self._loop.close()
        self._timer.close()
        if self._handles:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _connect(self, request_id: str, raw: bytes) -> None:
        try:
            _, connection = await self._loop.create_connection(
                lambda: _Connection(self), self._url.host, self._url.port, ssl=self._tls
            )
        except OSError as error:
            why = error.strerror or error
            self._failure = PipelineUnavailable(f"no server answers at {self._url.text}: {why}")
            self._loop.stop()
        else:
            connection.ask(request_id, raw)

    async def _end(self) -> None:
        for task in self._connecting:
            task.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        for connection in self._connections:
            connection.forget()
        await asyncio.sleep(0)
        self._loop.stop()

    # What connections tell.

    def connect(self, request_id: str, raw: bytes) -> None:
        """Sends a request over a new connection."""
        task = self._loop.create_task(self._connect(request_id, raw))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    def opened(self, connection: _Connection) -> None:
        self._connections.add(connection)

    def came(self, message: ServerMessage) -> None:
        self._came.append(message)
        self._loop.stop()

    def idle(self, connection: _Connection) -> None:
        self._idle.append(connection)

    def lost(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)


class _Connection(asyncio.Protocol):
    """One connection, with one request at a time."""

    transport: asyncio.Transport

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._parser = httptools.HttpResponseParser(self)
        self._id: str | None = None  # of the request that is answered
        self._kept = False
        self._again: bytes | None = None
        self._reason: str | None = None

    def ask(self, request_id: str, raw: bytes) -> None:
        self._id = request_id
        # A server may close a kept connection just before a request comes.
        self._again = raw if self._kept else None
        self._kept = True
        self._partial = b""  # the line whose end has not come, or the body of a refusal
        self._tokens = 0
        self._error: _ErrorBody | None = None
        self._reason = None
        self._usage: _Usage | None = None
        if self.transport.is_closing():
            self.connection_lost(None)
        else:
            self.transport.write(raw)

    def forget(self) -> None:
        """Disconnects, and tells nothing more."""
        self._id = None
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._client.opened(self)

    def data_received(self, data: bytes) -> None:
        self._again = None
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(
                "invalid_answer", f"no answer of an OpenAI API: {error.__context__ or error}"
            )
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.lost(self)
        if self._id is not None and self._again is not None:
            request_id, self._id = self._id, None
            self._client.connect(request_id, self._again)
        elif self._reason is not None:  # the answer has no other end
            self._finish()
        else:
            self._fail("connection_lost", "the server has closed the connection")

    # What the parser tells.

    def on_body(self, body: bytes) -> None:
        body = self._partial + body if self._partial else body
        if self._parser.get_status_code() != 200:
            self._partial = body
            return
        *lines, self._partial = body.split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                self._take(_decode(data))

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() != 200:
            self._refused()
        elif self._error is not None:
            self._fail(self._error.named("error"), self._error.message)
        elif self._reason is None:
            self._fail("incomplete", "the stream has ended without a finish reason")
        else:
            self._finish()
        if self._parser.should_keep_alive():
            self._client.idle(self)
        else:
            self.transport.close()

    def _take(self, event: _Event) -> None:
        for choice in event.choices:
            delta = choice.delta
            if choice.text or delta.content or delta.reasoning_content or delta.reasoning:
                text = choice.text or delta.content or ""
                self._delta(ONE_TOKEN, text)
            self._reason = choice.finish_reason or self._reason
        self._usage = event.usage or self._usage
        self._error = event.error or self._error

    def _delta(self, token_ids: list[int], text: str) -> None:
        if self._id is not None:
            delta = Delta(id=self._id, offset=self._tokens, token_ids=token_ids, text=text)
            self._client.came(delta)
            self._tokens += len(token_ids)

    def _finish(self) -> None:
        usage = self._usage or _Usage(completion_tokens=self._tokens)
        if (missing := usage.completion_tokens - self._tokens) > 0:
            self._delta(ONE_TOKEN * missing, "")
        details = usage.prompt_tokens_details
        cached = details.cached_tokens or 0 if details else 0
        told = Usage(usage.prompt_tokens, usage.completion_tokens, cached)
        if self._id is not None:
            # Other servers have further reasons.
            reason = cast(FinishReason, self._reason)
            self._client.came(Finish(id=self._id, finish_reason=reason, usage=told))
            self._id = None

    def _refused(self) -> None:
        status = f"http_{self._parser.get_status_code()}"
        try:
            error = msgspec.json.decode(self._partial, type=_Event).error or _ErrorBody()
        except msgspec.DecodeError:
            error = _ErrorBody(self._partial[:200].decode(errors="replace"))
        self._fail(error.named(status), error.message)

    def _fail(self, code: str, message: str) -> None:
        if self._id is not None:
            # Servers have codes of their own.
            error = Error(id=self._id, code=cast(ErrorCode, code), message=message)
            self._id = None
            self._client.came(error)


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # what some servers call it


class _Choice(msgspec.Struct):
    """`text` of a completion, `delta` of a chat."""

    text: str = ""
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _ErrorBody(msgspec.Struct):
    message: str = ""
    code: str | int | None = None

    def named(self, otherwise: str) -> str:
        """The code, where it is a name."""
        return self.code if isinstance(self.code, str) else otherwise


class _Event(msgspec.Struct):
    """What an event holds, and the body of a refusal."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _ErrorBody | None = None


_decode = msgspec.json.Decoder(_Event).decode


def _asked(request: Generate, model: str) -> dict[str, Any]:
    """The body. Keys that OpenAI's own API does not have are there only where they say something:
    `ignore_eos`, `top_k`, `min_p`, `cache_salt`."""
    sampling = request.sampling
    asked: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "ignore_eos": sampling.ignore_eos or None,
        "top_k": sampling.top_k or None,
        "min_p": sampling.min_p or None,
        "cache_salt": request.cache_salt,
        "messages": request.messages,
        "prompt": request.prompt or request.prompt_token_ids,
    }
    return {name: value for name, value in asked.items() if value is not None}
