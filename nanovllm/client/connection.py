"""A core and its socket, run by an asyncio loop: what every client is made of."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from nanovllm.client.core import ClientCore
from nanovllm.client.results import Pending
from nanovllm.keys import client_keys
from nanovllm.transport.curve import secure_to_connect
from nanovllm.transport.router_monitor import readable

log = logging.getLogger(__name__)

# One wake-up reads no more once it has read so much, so that an event loop gets its turn: about
# 10 to 20 ms of CPU. A frame may hold deltas of all requests, with logprobs.
BYTES_PER_WAKE_UP: Final = 512 << 10
# What reading a frame costs beside its bytes, in bytes.
FRAME_BYTES: Final = 512
# How long until a pipeline that is stopped, or whose machine is gone, is noticed.
ZMTP_HEARTBEAT_MS: Final = 1000
ZMTP_TIMEOUT_MS: Final = 3000
# Where packets are dropped, TCP itself would wait twice as long before each try.
CONNECT_TIMEOUT_MS: Final = 1000
# What each event of the socket's monitor tells the core.
_TELL: Final = {
    zmq.EVENT_CONNECTED: ClientCore.reached,
    zmq.EVENT_CONNECT_RETRIED: ClientCore.unreachable,
    zmq.EVENT_DISCONNECTED: ClientCore.disconnected,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: ClientCore.key_refused,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: ClientCore.not_understood,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: ClientCore.turned_away,
}


class Connection:
    """A client's connection. Its methods are called in the thread of `loop`.

    Each session has a socket of its own, and there is one socket at a time: what was meant for an
    earlier incarnation of the ingress never reaches a later one.

    Args:
        endpoint: the ingress.
        timeout: see `ClientCore`.
        keys: see `client_keys`.
        loop: the event loop that wakes the connection.

    Raises:
        ValueError: `endpoint` is not an endpoint, or `keys` is no file of keys.
    """

    def __init__(
        self, endpoint: str, timeout: float, keys: str | None, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._curve = client_keys(endpoint, keys)
        self.core = ClientCore(endpoint, timeout, has_key=self._curve is not None)
        self.closed = False
        self._endpoint = endpoint
        self._loop = loop
        self._process = os.getpid()
        self._watched: list[int] = []
        self._timer: asyncio.TimerHandle | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._open()
        except BaseException:
            self._context.destroy(linger=0)
            raise

    @property
    def inherited(self) -> bool:
        """Whether this process is a fork of the one that connected: it has no part in the
        connection. Any thread may ask."""
        return os.getpid() != self._process

    def check_process(self) -> None:
        """Raises RuntimeError if the connection is `inherited`. Any thread may call this."""
        if self.inherited:
            raise RuntimeError(
                f"made in process {self._process}, which this process was forked from: a fork"
                " cannot use a Client, an AsyncClient or an LLM that it inherits; make a new one"
            )

    def submit(self, *pendings: Pending) -> None:
        """Sends requests or pings. They fail if the connection is closed."""
        self.check_process()
        for pending in pendings:
            self.core.submit(pending)
        self._pump(reads=False)

    def abandon(self, *pendings: Pending) -> None:
        """Aborts requests, or drops pings."""
        for pending in pendings:
            self.core.abandon(pending)
        self._pump(reads=False)

    def close(self, reason: str = "the client is closed") -> None:
        """Disconnects. What is unfinished fails; the ingress aborts it."""
        if self.closed or self.inherited:
            return
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._watch()
        self._context.destroy(linger=0)
        self.core.close(reason)
        self._pump()

    def _pump(self, *, reads: bool = True) -> None:
        """Reads and sends what there is, without blocking, and tells what has changed. Only the
        loop has it read: a program may submit or abandon many requests in one turn."""
        if not self.closed:
            try:
                self._exchange(BYTES_PER_WAKE_UP if reads else 0)
                self._wake_later()
            except Exception as error:
                log.exception("the client's connection has failed")
                self.close(f"the client is closed, because its connection has failed: {error}")
        for pending in self.core.changed():
            pending.on_change()

    def _exchange(self, left: int) -> None:
        while left > 0 and readable(self._socket):
            frame = self._socket.recv()
            left -= FRAME_BYTES + len(frame)
            self.core.receive(frame)
        while readable(self._monitor):
            event = parse_monitor_message(self._monitor.recv_multipart())["event"]
            _TELL[zmq.Event(event)](self.core)
        now = time.monotonic()
        if self.core.advance(now):
            self._close_sockets()
            self._open()
            self.core.renewed(now)
        for frame in self.core.frames():
            self._socket.send(frame, zmq.DONTWAIT)

    def _wake_later(self) -> None:
        """The descriptors are edge-triggered (ZMQ_FD): what is readable is read before waiting."""
        if self._timer is not None:
            self._timer.cancel()
        wait = self.core.wait_s(time.monotonic())
        if readable(self._socket) or readable(self._monitor):
            wait = 0.0
        self._timer = None if wait is None else self._loop.call_later(wait, self._pump)

    def _open(self) -> None:
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        # No bound: the program bounds the requests, and `max_tokens` bounds their output.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, ZMTP_HEARTBEAT_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, ZMTP_TIMEOUT_MS)
        secure_to_connect(self._socket, self._endpoint, self._curve)
        self._monitor = self._socket.get_monitor_socket(sum(_TELL))
        try:
            self._socket.connect(self._endpoint)
        except zmq.ZMQError as error:
            raise ValueError(
                f"cannot connect to {self._endpoint!r}: {error.strerror};"
                " an endpoint is tcp://HOST:PORT or ipc://PATH"
            ) from None
        self._watch(self._socket.FD, self._monitor.FD)

    def _close_sockets(self) -> None:
        self._watch()
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)

    def _watch(self, *descriptors: int) -> None:
        """Has the loop call `_pump` for these descriptors, and no others."""
        for descriptor in self._watched:
            self._loop.remove_reader(descriptor)
        for descriptor in descriptors:
            self._loop.add_reader(descriptor, self._pump)
        self._watched = list(descriptors)
