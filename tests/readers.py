"""Client processes that ask and read, until they are stopped or killed."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import zmq

from benchmarks.support.raw_client import RawClient

TIMEOUT_S = 20.0


def free_tcp_endpoint() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


@contextmanager
def reader(endpoints: list[str], asks: list[dict[str, Any]]) -> Iterator[subprocess.Popen[bytes]]:
    """A client process that has asked each of `asks` at each endpoint, on connections of their
    own."""
    arguments = [" ".join(endpoints), *(msgspec.json.encode(ask).decode() for ask in asks)]
    process = subprocess.Popen([sys.executable, "-m", "tests.readers", *arguments])
    try:
        yield process
    finally:
        process.kill()
        process.wait(TIMEOUT_S)


def main(endpoints: str, *asks: str) -> None:
    """Connects once to each endpoint for each request, and reads whatever comes."""
    poller = zmq.Poller()
    clients: dict[Any, RawClient] = {}
    for ask in asks:
        for endpoint in endpoints.split():
            client = RawClient(endpoint)
            client.say({"type": "generate", "prompt": "x", **msgspec.json.decode(ask)})
            poller.register(client.socket, zmq.POLLIN)
            clients[client.socket] = client
    while True:
        for readable, _ in poller.poll():
            clients[readable].receive()


if __name__ == "__main__":
    main(*sys.argv[1:])
