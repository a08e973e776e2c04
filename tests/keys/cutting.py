"""A network that fails: a TCP proxy that cuts a connection after so many bytes."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator


class CuttingProxy:
    """Passes on what goes to and fro between its own port and another one. Each of the first
    connections is cut once a number of bytes has come back to the client.

    Attributes:
        endpoint: where clients connect.
        left: the byte counts of the cuts that are still to come.
    """

    def __init__(self, port: int, *cuts: int) -> None:
        self.left = [*cuts]
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                for source, sink, counts in ((client, server, False), (server, client, True)):
                    arguments = (source, sink, counts)
                    threading.Thread(target=self._pass_on, args=arguments, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, counts: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):  # cut from the other direction
            while text := source.recv(4096):
                sink.sendall(text)
                passed += len(text)
                if counts and self.left and passed >= self.left[0]:
                    self.left.pop(0)
                    break
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def cutting_proxy(port: int, *cuts: int) -> Iterator[CuttingProxy]:
    proxy = CuttingProxy(port, *cuts)
    try:
        yield proxy
    finally:
        proxy.close()
