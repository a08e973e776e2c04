"""Clients that send what they should not."""

from __future__ import annotations

import copy
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from benchmarks.support.raw_client import RawClient
from nanovllm.protocol import Error, ErrorCode, Pong, ServerMessage

TIMEOUT_S = 20.0
CONNECTION = 100
encode = msgspec.msgpack.encode
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
    "tools", "continue_final_message", "reasoning", "client", "stream", "resume_token_ids",
    "cache_salt", "unknown", "ids",
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


def full_ask() -> dict[str, Any]:
    """A request with every key that one can have."""
    return {
        "type": "generate",
        "id": "a",
        "messages": [{"role": "user", "content": "hé", "name": None}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "continue_final_message": False,
        "reasoning": {"open": 4, "close": 5},
        "chat_template_kwargs": {"enable_thinking": False, "deep": [{"a": 1.5}]},
        "sampling": {
            "temperature": 0,
            "top_p": 0.5,
            "top_k": 3,
            "min_p": 0.1,
            "max_tokens": 7,
            "stop": ["\n"],
            "stop_token_ids": [4],
            "ignore_eos": True,
            "seed": -(2**63),
            "logprobs": 20,
        },
        "stream": False,
        "resume_token_ids": [1, 2],
        "cache_salt": "s",
    }


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
    """A good frame with some bytes changed, missing or added; or its beginning."""
    good = [ASK, {"type": "ping", "id": "p"}, {"type": "abort", "id": "h"}, full_ask()]
    frame = bytearray(encode(draw.choice(good)))
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(frame))
        match draw.randrange(3):
            case 0:
                frame[at] = draw.randrange(256)
            case 1:
                del frame[at]
            case 2:
                frame.insert(at, draw.randrange(256))
    return bytes(frame[: draw.randrange(len(frame))] if draw.random() < 0.2 else frame)


def array(draw: random.Random) -> bytes:
    """An array of good and bad messages."""
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
        lambda: [array(draw)],
        lambda: framed(draw),
    ]
    while True:
        yield draw.choice(kinds)()


class Hostile(threading.Thread):
    """A client that sends so many of `hostile_messages`, a hundred over each of its connections.

    Args:
        endpoint: the ingress.
        seed: of what it sends.
        messages: how many it sends.
        reads: whether it reads what it is told. One that does not leaves as soon as it has sent.

    Attributes:
        sent: how many messages it has sent.
        errors: how many of them it was told of.
    """

    def __init__(self, endpoint: str, seed: int, messages: int, *, reads: bool) -> None:
        super().__init__(daemon=True)
        self.sent = 0
        self.errors = 0
        self._endpoint, self._reads = endpoint, reads
        self._messages = itertools.islice(hostile_messages(seed), messages)
        self._failure: Exception | None = None

    def run(self) -> None:
        try:
            while batch := list(itertools.islice(self._messages, CONNECTION)):
                self._connection(batch)
        except Exception as error:  # for `check` to raise
            self._failure = error

    def check(self) -> None:
        """Raises what was wrong with a reply, if anything was."""
        if self._failure is not None:
            raise self._failure

    def _connection(self, batch: list[list[bytes]]) -> None:
        with RawClient(self._endpoint, RCVHWM=0) as client:
            for frames in batch:
                client.send(*frames)
                self.sent += 1
                while self._reads and (replies := client.receive()):
                    self._take(replies)
            # Frames of a connection are looked at in order: after the pong, all have been.
            client.say({"type": "ping", "id": "last"})
            last = not self._reads
            while not last:
                replies = client.receive(TIMEOUT_S)
                if not replies:
                    raise TimeoutError("a ping was not answered")
                last = self._take(replies)

    def _take(self, replies: list[ServerMessage]) -> bool:
        """Counts errors; whether the last pong is among the replies."""
        last = False
        for reply in replies:
            last |= isinstance(reply, Pong) and reply.id == "last"
            if isinstance(reply, Error):
                if reply.code not in CLIENTS_FAULT or not reply.message:
                    raise ValueError(f"a bad message was answered by {reply}")
                self.errors += 1
        return last
