"""Peers without a key: `python -m tests.keys.hostile HOST PORT HALF_OPEN`.

They say to a port what a valid client would, in each version and mechanism of ZMTP, and things that
nobody would; and they open connections by the thousand, and say nothing or not enough. All wait
until they are disconnected. Prints a line for each kind: its name, and the most that one of them
was sent, in hex.
"""

from __future__ import annotations

import random
import resource
import selectors
import socket
import sys
import time
from dataclasses import dataclass
from typing import Final

import msgspec

# Longer than a peer has to finish a handshake.
PATIENCE_S: Final = 60.0
ASK: Final = msgspec.msgpack.encode(
    {"type": "generate", "id": "1", "prompt": "Once", "sampling": {"max_tokens": 4}}
)
SIGNATURE: Final = b"\xff" + bytes(7) + b"\x01\x7f"


@dataclass
class Peer:
    kind: str
    socket: socket.socket
    answer: bytes = b""


def greeting(mechanism: bytes, minor: int = 1, as_server: bool = False) -> bytes:
    """That of ZMTP 3."""
    end = bytes([as_server]) + bytes(31)
    return SIGNATURE + bytes([3, minor]) + mechanism.ljust(20, b"\0") + end


def command(name: bytes, body: bytes) -> bytes:
    content = bytes([len(name)]) + name + body
    return b"\x04" + bytes([len(content)]) + content


def message(body: bytes) -> bytes:
    return b"\x00" + bytes([len(body)]) + body


def sayings(rng: random.Random) -> dict[str, list[bytes]]:
    """What peers of each kind say."""
    ready = command(b"READY", b"\x0bSocket-Type\x00\x00\x00\x06DEALER")
    plain = command(b"HELLO", b"\x05admin\x05admin")
    return {
        "random": [rng.randbytes(rng.randrange(1, 400)) for _ in range(20)],
        "http": [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"],
        "frame": [message(ASK)],
        "zmtp 1": [b"\x01\x00" + bytes([len(ASK) + 1, 0]) + ASK],
        "zmtp 2": [SIGNATURE + b"\x01\x05" + b"\x00\x00" + message(ASK)],
        "null": [greeting(b"NULL", minor) + ready + message(ASK) for minor in (0, 1)],
        "plain": [greeting(b"PLAIN") + plain + command(b"INITIATE", b"") + message(ASK)],
        "curve": [
            greeting(b"CURVE") + message(ASK),
            greeting(b"CURVE") + ready + message(ASK),
            greeting(b"CURVE", as_server=True) + ready + message(ASK),
            greeting(b"CURVE") + command(b"HELLO", b"\x01\x00" + rng.randbytes(192)) + message(ASK),
            greeting(b"CURVE") + command(b"INITIATE", rng.randbytes(200)) + message(ASK),
        ],
        "half open": [b"", SIGNATURE[:1], SIGNATURE, greeting(b"CURVE")[:-1], greeting(b"CURVE")],
    }


def assert_nothing_is_answered(told: str) -> None:
    """
    Args:
        told: what this program has printed.
    """
    answers = dict(line.split(": ") for line in told.splitlines())
    assert len(answers) == len(sayings(random.Random(0)))
    for kind, answer in answers.items():
        assert greeting(b"CURVE").startswith(bytes.fromhex(answer)), f"{kind} was answered"


def main(host: str, port: int, half_open: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    said = sayings(random.Random(7))
    said["half open"] *= -(-half_open // len(said["half open"]))
    open_now = selectors.DefaultSelector()
    answers = dict.fromkeys(said, b"")
    for kind, texts in said.items():
        for text in texts:
            connection = socket.create_connection((host, port), PATIENCE_S)
            connection.sendall(text)
            open_now.register(connection, selectors.EVENT_READ, Peer(kind, connection))
    deadline = time.monotonic() + PATIENCE_S
    while open_now.get_map():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(open_now.get_map())} peers are still connected")
        for key, _ in open_now.select(1.0):
            peer: Peer = key.data
            try:
                got = peer.socket.recv(4096)
            except ConnectionError:
                got = b""
            peer.answer += got
            if not got:
                open_now.unregister(peer.socket)
                peer.socket.close()
                answers[peer.kind] = max(answers[peer.kind], peer.answer, key=len)
    for kind, answer in answers.items():
        print(f"{kind}: {answer.hex()}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
