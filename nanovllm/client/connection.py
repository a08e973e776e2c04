"""A core and its socket, for the synchronous and the asynchronous client."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import zmq

from nanovllm.client.core import ClientCore
from nanovllm.client.results import Pending
from nanovllm.transport.router_monitor import readable

# Frames that one wake-up reads at most, so that an event loop gets its turn.
BATCH: Final = 256
# How long until a pipeline that is stopped, or whose machine is gone, is noticed.
ZMTP_HEARTBEAT_MS: Final = 1000
ZMTP_TIMEOUT_MS: Final = 3000


class Connection:
    """A client's connection.

    Each session has a socket of its own, and there is one socket at a time: what was meant for an
    earlier incarnation of the ingress never reaches a later one.

    Args:
        endpoint: the ingress.
        timeout: see `ClientCore`.
        watch: called with the file descriptors that tell when to `pump`, whenever the descriptors
            change; called with none before the former descriptors are closed.

    Raises:
        ValueError: `endpoint` is not an endpoint.
    """

    def __init__(
        self,
        endpoint: str,
        timeout: float,
        watch: Callable[[Sequence[int]], None] = lambda descriptors: None,
    ) -> None:
        self.core = ClientCore(endpoint, timeout)
        self._endpoint = endpoint
        self._watch = watch
        self._pumping = False
        self._abandoned: list[Pending] = []  # by destructors, during a `pump`
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._open()
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def pump(self) -> list[Pending]:
        """Reads and sends what there is, without blocking; returns what has changed.

        The descriptors are edge-triggered (ZMQ_FD): while `readable`, call `pump` again at once.

        Raises:
            RuntimeError: the connection has been closed.
        """
        if self._context.closed:
            raise RuntimeError("the client is closed")
        self._pumping = True
        try:
            return self._pump()
        finally:
            self._pumping = False

    def _pump(self) -> list[Pending]:
        for _ in range(BATCH):
            if not readable(self._socket):
                break
            self.core.receive(self._socket.recv())
        while readable(self._monitor):
            self._monitor.recv_multipart()
            self.core.disconnected()
        while self._abandoned:
            self.core.abandon(self._abandoned.pop())
        now = time.monotonic()
        if self.core.advance(now):
            self._close()
            self._open()
            self.core.renewed(now)
        for frame in self.core.frames():
            self._socket.send(frame, zmq.DONTWAIT)
        return self.core.changed()

    def wait(self, timeout: float | None = None) -> list[Pending]:
        """Runs until something has changed, or for `timeout` seconds; returns what has changed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (changed := self.pump()):
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                break
            if not self.readable:
                left = None if deadline is None else deadline - now
                waits = (self.core.wait_s(now), left)
                self._poll(min((wait for wait in waits if wait is not None), default=None))
        return changed

    def abandon(self, pending: Pending) -> None:
        """Aborts a request, or drops a ping. A destructor may call this, whenever it runs."""
        self._abandoned.append(pending)
        if not self._pumping and not self._context.closed:
            self.pump()

    @property
    def readable(self) -> bool:
        """Whether `pump` has something to read."""
        return readable(self._socket) or readable(self._monitor)

    def close(self) -> None:
        """Disconnects; the ingress then aborts what is unfinished."""
        if not self._context.closed:
            self._close()
            self._context.destroy(linger=0)

    def _poll(self, seconds: float | None) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        poller.poll(None if seconds is None else int(seconds * 1000) + 1)

    def _open(self) -> None:
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        # No bound: the program bounds the requests, and `max_tokens` bounds their output.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, ZMTP_HEARTBEAT_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, ZMTP_TIMEOUT_MS)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            self._socket.connect(self._endpoint)
        except zmq.ZMQError as error:
            raise ValueError(
                f"cannot connect to {self._endpoint!r}: {error.strerror};"
                " an endpoint is tcp://HOST:PORT or ipc://PATH"
            ) from None
        self._watch([self._socket.FD, self._monitor.FD])

    def _close(self) -> None:
        self._watch([])
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)
