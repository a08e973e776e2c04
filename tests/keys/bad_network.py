"""A network that fails, or that somebody tampers with: a TCP proxy that cuts and damages."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator


class BadNetwork:
    """Passes on what goes to and fro between its own port and another one.

    Attributes:
        endpoint: where clients connect.
        cuts: a connection is cut once so many bytes have come back to the client, one for each cut
            that is left.
        flips: likewise, a bit of the byte at this position from the client is flipped.
    """

    def __init__(self, port: int, cuts: list[int], flips: list[int]) -> None:
        self.cuts, self.flips = cuts, flips
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
                for pass_on, source, sink in (
                    (self._there, client, server),
                    (self._back, server, client),
                ):
                    arguments = (pass_on, source, sink)
                    threading.Thread(target=_until_the_end, args=arguments, daemon=True).start()

    def _there(self, passed: int, text: bytes) -> bytes:
        if self.flips and passed <= self.flips[0] < passed + len(text):
            at = self.flips.pop(0) - passed
            return text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :]
        return text

    def _back(self, passed: int, text: bytes) -> bytes:
        if self.cuts and passed + len(text) >= self.cuts[0]:
            self.cuts.pop(0)
            raise ConnectionAbortedError
        return text


def _until_the_end(
    pass_on: Callable[[int, bytes], bytes], source: socket.socket, sink: socket.socket
) -> None:
    passed = 0
    with contextlib.suppress(OSError):  # it is cut
        while text := source.recv(4096):
            sink.sendall(pass_on(passed, text))
            passed += len(text)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def bad_network(
    port: int, cuts: Iterable[int] = (), flips: Iterable[int] = ()
) -> Iterator[BadNetwork]:
    network = BadNetwork(port, [*cuts], [*flips])
    try:
        yield network
    finally:
        network.close()
