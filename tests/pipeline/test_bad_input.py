"""Hostile clients beside a good one: its stream is whole, no service ends, nobody is misled."""

from __future__ import annotations

import copy
import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import zmq

from nanovllm.protocol import Error, ErrorCode, Pong, ServerMessage
from tests.pipeline.leftovers import wait_until_nothing_is_left
from tests.pipeline.wire import Wire
from tests.pipelines import Pipeline

SEED = int(os.environ.get("BAD_INPUT_SEED", "7"))
HOSTILE_CLIENTS = 3
MESSAGES_EACH = 1500
encode = msgspec.msgpack.encode
_replies = msgspec.msgpack.Decoder(list[ServerMessage])
# "internal" would be ours.
CLIENTS_FAULT: set[ErrorCode] = {"invalid_request", "context_length_exceeded", "duplicate_id"}

ASK: dict[str, Any] = {"type": "generate", "id": "h", "prompt": "x", "sampling": {"max_tokens": 2}}
WRONG_VALUES: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, -(2**63), 2**64 - 1, 1.5, float("nan"), float("inf"), "", "x",
    "\x00" * 200, b"bytes", [], [[]], [None], [-1], [2**31], ["", 1], {}, {"": None}, {1: 2},
    msgspec.msgpack.Ext(5, b"ext"), "y" * 100_000, list(range(5000)),
]  # fmt: skip
KEYS = [
    "type", "id", "prompt", "prompt_token_ids", "messages", "chat_template_kwargs", "sampling",
    "stream", "resume_token_ids", "cache_salt", "unknown", "ids",
]  # fmt: skip
SAMPLING_KEYS = [
    "temperature", "top_p", "top_k", "min_p", "max_tokens", "stop", "stop_token_ids", "ignore_eos",
    "seed", "logprobs", "unknown",
]  # fmt: skip
# Headers of MessagePack that promise far more than comes.
HUGE_LENGTHS = [
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xffx",
    b"\xc6\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x01", b"\xdc\xff\xff", b"\xde\xff\xff",
    b"\x9f", b"\x8f",
]  # fmt: skip


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


def deep(draw: random.Random) -> list[bytes]:
    depth = draw.choice([17, 500, 5000, 200_000])
    start = encode("chat_template_kwargs")
    kwargs = b"\x83" + encode("type") + encode("generate") + encode("id") + encode("d")
    return [draw.choice([nested(depth), b"\x81\xa1a" * depth, kwargs + start + nested(depth)])]


def changed(draw: random.Random) -> Any:
    """A request with something wrong in it, or several things."""
    message = {**ASK, "sampling": dict(ASK["sampling"])}
    for _ in range(draw.randint(1, 2)):
        where, keys = draw.choice([(message, KEYS), (message["sampling"], SAMPLING_KEYS)])
        if isinstance(where, dict):
            where[draw.choice(keys)] = copy.copy(draw.choice(WRONG_VALUES))
    if draw.random() < 0.2:
        message.pop(draw.choice(list(message)))
    return message


def corrupted(draw: random.Random) -> bytes:
    """A good frame with some bytes changed, missing or added."""
    frame = bytearray(encode([ASK, {"type": "ping"}, {"type": "abort", "id": "h"}]))
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(frame))
        match draw.randrange(3):
            case 0:
                frame[at] = draw.randrange(256)
            case 1:
                del frame[at]
            case 2:
                frame.insert(at, draw.randrange(256))
    return bytes(frame)


def elements(draw: random.Random) -> bytes:
    """An array of good and bad ones."""
    good = [{"type": "ping", "id": "p"}, {"type": "abort", "id": "nobody"}]
    bad = [None, 5, "ping", [], [[{"type": "ping"}]], {}, {"type": "pong"}, {"type": 5}]
    return encode([draw.choice([*good, *bad, changed(draw)]) for _ in range(draw.randint(0, 30))])


def framed(draw: random.Random) -> list[bytes]:
    """Frames in wrong numbers and places."""
    one = encode({"type": "ping"})
    parts = [b"", b"x", one, draw.randbytes(3)]
    return [draw.choice(parts) for _ in range(draw.choice([2, 2, 3, 3, 4, 200]))]


def hostile_messages(seed: int) -> Iterator[list[bytes]]:
    """ZeroMQ messages, as their frames, without end."""
    draw = random.Random(seed)
    kinds: list[Callable[[], list[bytes]]] = [
        lambda: [draw.randbytes(draw.choice([0, 1, 2, 10, 100, 5000]))],
        lambda: [draw.choice(HUGE_LENGTHS) + draw.randbytes(draw.randint(0, 9))],
        lambda: deep(draw),
        lambda: [encode(changed(draw))],
        lambda: [encode(changed(draw))],
        lambda: [corrupted(draw)],
        lambda: [elements(draw)],
        lambda: framed(draw),
    ]
    while True:
        yield draw.choice(kinds)()


@pytest.fixture(scope="module")
def sim() -> Iterator[Pipeline]:
    with Pipeline("", "--device", "sim", "--sim-step-ms", "1", "--max-num-seqs", "64") as running:
        yield running


def pids(pipeline: Pipeline) -> dict[str, int]:
    return {f"{s.role} {s.index}": s.pid for s in pipeline.status().services}


class Hostile(threading.Thread):
    """A client that sends what it should not, over several connections.

    Attributes:
        replies: what it was told, as far as it reads.
        failure: what was wrong with a reply.
    """

    def __init__(self, endpoint: str, seed: int, reads: bool) -> None:
        super().__init__(daemon=True)
        self.endpoint, self.seed, self.reads = endpoint, seed, reads
        self.replies: list[ServerMessage] = []
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            with zmq.Context() as context:
                messages = itertools.islice(hostile_messages(self.seed), MESSAGES_EACH)
                while batch := list(itertools.islice(messages, 100)):
                    self._connection(context, batch)
        except Exception as error:  # for the test to raise
            self.failure = error

    def _connection(self, context: zmq.Context[Any], batch: list[list[bytes]]) -> None:
        with context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDTIMEO, 20_000)
            socket.connect(self.endpoint)
            for frames in batch:
                socket.send_multipart(frames)
                self._read(socket, 0)
            # Frames of a connection are looked at in order: after the pong, all have been.
            socket.send(encode({"type": "ping", "id": "last"}))
            while self.reads and not self._read(socket, 20_000):
                pass

    def _read(self, socket: zmq.Socket[bytes], timeout_ms: int) -> bool:
        """Takes what has come; whether the last pong is among it."""
        last = False
        if self.reads and timeout_ms and not socket.poll(timeout_ms):
            raise TimeoutError("a ping was not answered")
        while self.reads and socket.poll(0):
            new = _replies.decode(socket.recv_multipart()[-1])
            last |= any(isinstance(reply, Pong) and reply.id == "last" for reply in new)
            self.replies += new
        return last


def test_a_good_client_is_not_disturbed(sim: Pipeline) -> None:
    print(f"BAD_INPUT_SEED={SEED}")
    before = pids(sim)
    request: dict[str, Any] = {
        "prompt_token_ids": [7, 8],
        "sampling": {"max_tokens": 500, "seed": 3},
    }
    with Wire(sim.endpoint) as good:
        undisturbed = good.ask(**request)
        good.results(undisturbed)
        hostile = [
            Hostile(sim.endpoint, SEED * 1000 + number, reads=number > 0)
            for number in range(HOSTILE_CLIENTS)
        ]
        stream = good.ask(**request)
        good.until(lambda: stream.deltas)
        for client in hostile:
            client.start()
        attacked = True
        while attacked:
            attacked = any(client.is_alive() for client in hostile)
            whole = good.ask(prompt="Once", sampling={"max_tokens": 5}, stream=False)
            good.results(stream, whole)
            assert stream.token_ids == undisturbed.token_ids
            assert stream.text == undisturbed.text
            assert len(whole.token_ids) == 5
            stream = good.ask(**request)
        good.results(stream)
        assert not good.refused
        assert good.ping().ready
    for client in hostile:
        if client.failure is not None:
            raise client.failure
        errors = [reply for reply in client.replies if isinstance(reply, Error)]
        assert len(errors) > MESSAGES_EACH // 2 or not client.reads
        assert {error.code for error in errors} <= CLIENTS_FAULT
        assert all(error.message for error in errors)
    assert pids(sim) == before, "no service has died"
    wait_until_nothing_is_left(sim)
    assert not any("Traceback" in line or "ERROR" in line for line in sim.output)


def test_a_flood_of_pings_that_nobody_reads(sim: Pipeline) -> None:
    """The answers that may pile up are bounded, and others are served meanwhile."""
    with Wire(sim.endpoint) as flood, Wire(sim.endpoint) as good:
        frame = encode([{"type": "ping", "id": "x" * 1000}] * 8000)
        for _ in range(8):
            flood.send(frame)
            answer = good.ask(prompt="x", sampling={"max_tokens": 3})
            good.results(answer)
            assert len(answer.token_ids) == 3
    wait_until_nothing_is_left(sim)
