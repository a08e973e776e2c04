"""What carries the frames of a link: ZeroMQ sockets, for all links but that between scheduler and
rank 0 (`direct.py`).

A wire knows connections and frames, and nothing of who is at the other end. Nothing in it blocks.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

import zmq
from zmq.utils.monitor import parse_monitor_message

from nanovllm.connections import Connections, readable
from nanovllm.endpoints import bind
from nanovllm.wording import counted

log = logging.getLogger(__name__)

# Messages that one wake-up reads from one link at most, so that no link starves another.
BATCH = 256
HIGH_WATER_MARK = 4096
# A peer that is stopped, or whose cable is pulled, is noticed after this long. A busy one is not
# taken for it: ZeroMQ's own thread answers.
ZMTP_HEARTBEAT_MS = 1000
ZMTP_TIMEOUT_MS = 5000
# How soon a connection is tried anew at first, and at the latest.
RECONNECT_MS = 20, 200
# As plain integers: enum arithmetic would cost more than the sends.
_DONTWAIT = int(zmq.DONTWAIT)
_IDENTITY = int(zmq.SNDMORE | zmq.DONTWAIT)

Frame = bytes | memoryview
# What a binding side calls a connection; never used again.
Route = bytes | int


class ConnectedWire(Protocol):
    """The side that connects, again and again.

    Attributes:
        sockets: readable (sockets or descriptors) when there is something to read.
    """

    sockets: tuple[Any, ...]

    def read(self) -> list[Frame]:
        """The frames that came; at most a batch."""

    def changes(self) -> list[bool]:
        """Whether the connection was made or lost, each time that it was since the last call.
        Call it when what was read has been looked at: the frames came before."""

    def send(self, frame: bytes) -> bool:
        """Sends, or returns False."""

    def close(self) -> None: ...


class BoundWire(Protocol):
    """The side that binds.

    Attributes:
        sockets: readable (sockets or descriptors) when there is something to read.
    """

    sockets: tuple[Any, ...]

    def read(self) -> tuple[list[Route], list[tuple[Route, Frame]]]:
        """The connections that have ended, and the frames that came, last words of those among
        them; at most a batch."""

    def send(self, route: Route, frame: bytes) -> bool:
        """Sends, or returns False."""

    def close(self) -> None: ...


class Dealer:
    """Implements `ConnectedWire`."""

    def __init__(self, context: zmq.Context[Any], endpoint: str) -> None:
        self._socket = context.socket(zmq.DEALER)
        _set_options(self._socket)
        # Messages wait with their owner, where they are merged, and not in a pipe to nobody.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        first, longest = RECONNECT_MS
        self._socket.setsockopt(zmq.RECONNECT_IVL, first)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, longest)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        self.sockets = self._socket, self._monitor
        self._socket.connect(endpoint)

    def read(self) -> list[Frame]:
        frames: list[Frame] = []
        for parts in _read_batch(self._socket):
            if len(parts) == 1:
                frames.append(parts[0].buffer)
            else:
                log.error("dropped a message of %s", counted(len(parts), "frame"))
        return frames

    def changes(self) -> list[bool]:
        changes: list[bool] = []
        while readable(self._monitor):
            event = parse_monitor_message(self._monitor.recv_multipart())
            changes.append(event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED)
        return changes

    def send(self, frame: bytes) -> bool:
        try:
            self._socket.send(frame, _DONTWAIT)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=200)


class Router:
    """Implements `BoundWire`.

    Raises:
        EndpointTaken, EndpointUnusable: see `endpoints.bind`.
    """

    def __init__(self, context: zmq.Context[Any], endpoint: str) -> None:
        self._socket = context.socket(zmq.ROUTER)
        _set_options(self._socket)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._connections = Connections(self._socket)
        self.sockets = self._socket, self._connections.monitor
        try:
            self._release = bind(endpoint, lambda: self._socket.bind(endpoint))
        except OSError:
            self._close_sockets()
            raise

    def read(self) -> tuple[list[Route], list[tuple[Route, Frame]]]:
        batch = _read_batch(self._socket)
        ended: list[Route] = [*self._connections.closed()]
        frames: list[tuple[Route, Frame]] = []
        for parts in batch:
            routing_id = parts[0].bytes
            if routing_id in ended or self._connections.opened(routing_id, parts[0]):
                if len(parts) == 2:
                    frames.append((routing_id, parts[1].buffer))
                else:
                    log.error("dropped a message of %s", counted(len(parts) - 1, "frame"))
        return ended, frames

    def send(self, route: Route, frame: bytes) -> bool:
        try:
            self._socket.send(route, _IDENTITY)
            self._socket.send(frame, _DONTWAIT)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False  # the monitor tells of it too
        return True

    def close(self) -> None:
        self._close_sockets()
        self._release()

    def _close_sockets(self) -> None:
        self._socket.disable_monitor()
        self._connections.monitor.close(linger=0)
        self._socket.close(linger=200)


def _set_options(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.HEARTBEAT_IVL, ZMTP_HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, ZMTP_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, ZMTP_TIMEOUT_MS)


def _read_batch(socket: zmq.Socket[bytes]) -> list[list[zmq.Frame]]:
    batch: list[list[zmq.Frame]] = []
    while len(batch) < BATCH and readable(socket):
        parts = [socket.recv(copy=False)]
        while parts[-1].more:  # cheaper than recv_multipart, which asks the socket
            parts.append(socket.recv(copy=False))
        batch.append(parts)
    return batch
