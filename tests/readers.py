"""Client processes that ask and read, until they are stopped or killed."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

TIMEOUT_S = 20.0
# Connects once to each endpoint for each frame, sends it, and reads whatever comes.
READER = """
import sys, zmq
endpoints, frames = sys.argv[1].split(), map(bytes.fromhex, sys.argv[2:])
poller = zmq.Poller()
for frame in frames:
    for endpoint in endpoints:
        socket = zmq.Context.instance().socket(zmq.DEALER)
        socket.connect(endpoint)
        socket.send(frame)
        poller.register(socket, zmq.POLLIN)
while True:
    for socket, _ in poller.poll():
        socket.recv()
"""


def free_tcp_endpoint() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


@contextmanager
def reader(endpoints: list[str], asks: list[dict[str, Any]]) -> Iterator[subprocess.Popen[bytes]]:
    """A client process that has asked each of `asks` at each endpoint, on connections of their
    own."""
    frames = [msgspec.msgpack.encode({"type": "generate", "prompt": "x", **ask}) for ask in asks]
    arguments = [" ".join(endpoints), *(frame.hex() for frame in frames)]
    process = subprocess.Popen([sys.executable, "-c", READER, *arguments])
    try:
        yield process
    finally:
        process.kill()
        process.wait(TIMEOUT_S)
