"""A double of the ingress: a real ROUTER socket that answers as a test's script says."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import zmq

from nanovllm.protocol import (
    Abort,
    Accepted,
    ClientMessage,
    Delta,
    Finish,
    FinishReason,
    Generate,
    Ping,
    Pong,
    ServerMessage,
    Usage,
)

TIMEOUT_S = 60.0
SEED = 77


class HangUp:
    """In a script's answers: the double closes all connections, and starts again as another
    incarnation."""


Answer = ServerMessage | HangUp
# The double's answers to one message of a client; the second argument is the client's session.
Script = Callable[[Any, str], Iterator[Answer]]


class IngressDouble:
    """Serves on a TCP port, a free one unless `endpoint` names it, until the test ends."""

    def __init__(self, script: Script, on_ping: Script, endpoint: str | None) -> None:
        self.received: list[ClientMessage] = []  # from all clients, in order
        self._script = script
        self._on_ping = on_ping
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.setsockopt(zmq.SNDHWM, 0)  # above its limit a ROUTER drops messages
        self._router = self._context.socket(zmq.ROUTER)
        self._router.bind(endpoint or "tcp://127.0.0.1:*")
        self.endpoint = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._incarnation = secrets.token_hex(4)
        self._decoder = msgspec.msgpack.Decoder(ClientMessage)
        self._encoder = msgspec.msgpack.Encoder()
        self._news = threading.Condition()
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def wait_for(self, condition: Callable[[list[ClientMessage]], bool]) -> None:
        """Returns once the messages received fulfil `condition`."""
        with self._news:
            if not self._news.wait_for(lambda: condition(self.received), TIMEOUT_S):
                raise TimeoutError(f"received only {self.received}")

    @property
    def generates(self) -> list[Generate]:
        return [message for message in self.received if isinstance(message, Generate)]

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(TIMEOUT_S)
        if self._failure is not None:
            raise self._failure

    def _serve(self) -> None:
        try:
            while not self._stopping.is_set():
                if self._router.poll(20):
                    self._take(*self._router.recv_multipart())
        except BaseException as error:
            self._failure = error
        finally:
            self._context.destroy(linger=0)

    def _take(self, client: bytes, payload: bytes) -> None:
        session = f"{self._incarnation}-{client.hex()}"
        message = self._decoder.decode(payload)
        with self._news:
            self.received.append(message)
            self._news.notify_all()
        script = self._on_ping if isinstance(message, Ping) else self._script
        for answer in script(message, session):
            if isinstance(answer, HangUp):
                self._start_again()
                return
            self._router.send_multipart([client, self._encoder.encode([answer])])

    def _start_again(self) -> None:
        self._incarnation = secrets.token_hex(4)
        self._router.close(linger=1000)
        self._router = self._context.socket(zmq.ROUTER)
        deadline = time.monotonic() + TIMEOUT_S
        while True:  # the port is free when ZeroMQ's I/O thread has closed the old socket
            try:
                self._router.bind(self.endpoint)
                return
            except zmq.ZMQError as error:
                if error.errno != zmq.EADDRINUSE or time.monotonic() > deadline:
                    raise


def answer_ping(message: Any, session: str) -> Iterator[Answer]:
    yield Pong(id=message.id, session=session, version="0", model="double", ready=True)


def say_nothing(message: Any, session: str) -> Iterator[Answer]:
    yield from ()


@contextlib.contextmanager
def ingress(
    script: Script, on_ping: Script = answer_ping, endpoint: str | None = None
) -> Iterator[IngressDouble]:
    double = IngressDouble(script, on_ping, endpoint)
    try:
        yield double
    finally:
        double.stop()


def text_of(token_ids: list[int]) -> str:
    """The text of output tokens, as the double writes it."""
    return "".join(f"<{token_id}>" for token_id in token_ids)


def output_of(message: Generate) -> list[int]:
    """The double's model: the output depends on the prompt alone."""
    start = len(message.prompt or "") + len(message.prompt_token_ids or [])
    return list(range(start, start + message.sampling.max_tokens))


def finish(message: Generate | Abort, reason: FinishReason = "length", **fields: Any) -> Finish:
    usage = Usage(prompt_tokens=1, completion_tokens=2, cached_tokens=0)
    return Finish(id=message.id, finish_reason=reason, usage=usage, **fields)


def whole_answer(message: Generate, session: str) -> Iterator[ServerMessage]:
    """A well-behaved pipeline's answer, two tokens a delta, resuming where it is told to."""
    output = output_of(message)
    if not message.stream:
        logprobs: Any = msgspec.UNSET
        if message.sampling.logprobs is not None:
            logprobs = [[(token_id, -0.5)] for token_id in output]
        yield finish(message, text=text_of(output), token_ids=output, seed=SEED, logprobs=logprobs)
        return
    yield Accepted(id=message.id, session=session, seed=SEED)
    for at in range(len(message.resume_token_ids), len(output), 2):
        tokens = output[at : at + 2]
        yield Delta(id=message.id, offset=at, token_ids=tokens, text=text_of(tokens))
    yield finish(message)


def answer_in_full(message: Any, session: str) -> Iterator[Answer]:
    """A script: answers every request in full, and confirms every abort."""
    if isinstance(message, Generate):
        yield from whole_answer(message, session)
    elif isinstance(message, Abort):
        yield finish(message, "abort")
