"""Free ports for pipelines that other machines join."""

from __future__ import annotations

import contextlib
import socket


def free_services() -> str:
    """An endpoint for `--services`: neither its port nor the next one is taken."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            second.bind(("127.0.0.1", port + 1))
            return f"tcp://127.0.0.1:{port}"
