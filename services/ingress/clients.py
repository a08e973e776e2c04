"""The socket that clients connect to."""

from __future__ import annotations

import contextlib
import enum
import functools
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import zmq

from nanovllm.keys import PipelineKeys
from nanovllm.transport.curve import is_tcp, secure_to_bind
from nanovllm.transport.endpoints import bind
from nanovllm.transport.router_monitor import Connections, readable

_DONTWAIT = int(zmq.DONTWAIT)  # a plain integer: enum arithmetic is slow
# The most messages that one wake-up reads, far more than it handles: only messages that have been
# read are counted, however large.
MAX_BATCH = 1024
# Messages that ZeroMQ holds for one client. Output waits merged until there is room again, so a
# higher mark would only take more memory for a slow client, and show a stopped client later.
SEND_HIGH_WATER_MARK = 16
# libzmq 4.3.5 aborts the process if a heartbeat is due on a connection that has ended while its
# receive queue was full. So no receive queue is ever full: each wake-up reads what has come, and
# the core bounds it by ending connections. (A mark would count messages, which can have any size.)
RECEIVE_HIGH_WATER_MARK = 0
# A client that is stopped, or whose cable is pulled, does not answer a heartbeat: after the sum of
# the two times its connection ends. Heartbeats carry no time-to-live: by one, a client that reads
# slowly would end the connection itself, and libzmq would abort its process as it reconnects.
ZMTP_HEARTBEAT_MS = 400
ZMTP_TIMEOUT_MS = 1200
# A longer frame closes its connection, so that no client makes ZeroMQ hold it.
CLOSING_FACTOR = 8


class Sent(enum.Enum):
    DONE = enum.auto()
    FULL = enum.auto()  # the client does not read: try again later
    GONE = enum.auto()  # there is no such connection


class FromClient(NamedTuple):
    """A ZeroMQ message; `frame` is None if it was not one frame."""

    connection: bytes
    frame: bytes | None


class ClientSocket:
    """A ROUTER that does not block, and that knows which clients are connected.

    Args:
        keys: of the pipeline, for TCP endpoints; None: they need none.

    Raises:
        EndpointTaken, EndpointUnusable: see `endpoints.bind`.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoints: list[str],
        max_message_bytes: int,
        keys: PipelineKeys | None = None,
    ) -> None:
        self.socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.MAXMSGSIZE, CLOSING_FACTOR * max_message_bytes)
        self.socket.setsockopt(zmq.SNDHWM, SEND_HIGH_WATER_MARK)
        self.socket.setsockopt(zmq.RCVHWM, RECEIVE_HIGH_WATER_MARK)
        self.socket.setsockopt(zmq.HEARTBEAT_IVL, ZMTP_HEARTBEAT_MS)
        self.socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, ZMTP_TIMEOUT_MS)
        trusted = None if keys is None else functools.partial(keys.trusted, "clients")
        self._connections = Connections(self.socket, trusted)
        self.monitor = self._connections.monitor
        self._batch: deque[list[zmq.Frame]] = deque()
        self._release = contextlib.ExitStack()
        try:
            # TCP last: its options would hold for what is bound later, too.
            for endpoint in sorted(endpoints, key=is_tcp):
                curve = keys.clients if keys is not None and is_tcp(endpoint) else None
                secure_to_bind(self.socket, endpoint, curve)
                do_bind = functools.partial(self.socket.bind, endpoint)
                self._release.callback(bind(endpoint, do_bind))
        except OSError:
            self.close()
            raise

    def read(self) -> None:
        """Takes ZeroMQ messages from the socket; they come with the next `receive`."""
        while len(self._batch) < MAX_BATCH and readable(self.socket):
            self._batch.append(self.socket.recv_multipart(copy=False))

    def gone(self) -> list[bytes]:
        """The connections that have ended since; to be called after `read`, before `receive`."""
        return self._connections.closed()

    def receive(self) -> Iterator[FromClient]:
        """What was read, from connections that are still there. A connection can be ended between
        two messages: no more of its messages follow."""
        while self._batch:
            id_frame, *parts = self._batch.popleft()
            connection = id_frame.bytes
            if self._connections.opened(connection, id_frame):
                yield FromClient(connection, parts[0].bytes if len(parts) == 1 else None)

    def send(self, connection: bytes, frame: bytes) -> Sent:
        """Sends without blocking."""
        try:
            self.socket.send_multipart((connection, frame), _DONTWAIT)
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return Sent.GONE
        return Sent.DONE

    def disconnect(self, connection: bytes) -> None:
        """Ends a connection, with what ZeroMQ holds for it."""
        self._connections.cut(connection)

    def cut_untrusted(self) -> None:
        """Ends the connections of clients whose keys were taken back."""
        self._connections.cut_untrusted()

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=200)
        self._release.close()
