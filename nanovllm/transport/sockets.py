"""The ZeroMQ sockets under the links. They know connections and frames, but not peers. No call
blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import zmq

from nanovllm.transport.curve import HANDSHAKE_MS, Curve, secure_to_bind, secure_to_connect
from nanovllm.transport.endpoints import bind
from nanovllm.transport.router_monitor import Connections, next_event, readable
from nanovllm.wording import counted

log = logging.getLogger(__name__)

# Messages that one wake-up reads from one link at most, so that no link starves another.
BATCH = 256
# A peer that is stopped, or whose cable is pulled, is noticed after this time. A busy peer is not,
# since ZeroMQ's own thread answers heartbeats.
ZMTP_HEARTBEAT_MS = 1000
ZMTP_TIMEOUT_MS = 5000
# How soon a connection is tried anew at first, and at the latest.
RECONNECT_MS = 20, 200
# What listens there refuses this side's key, or does not connect as this side does. Where this side
# expects another key of it, it only ends the connection, as when it dies.
REFUSALS = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
# A connection that is not made by then is tried anew: where packets are dropped, TCP itself would
# wait twice as long each time.
CONNECT_TIMEOUT_MS = 1000
# As plain integers: enum arithmetic would cost more than the sends.
_DONTWAIT = int(zmq.DONTWAIT)
_IDENTITY = int(zmq.SNDMORE | zmq.DONTWAIT)


class Dealer:
    """The side that connects, again and again.

    Args:
        curve: the keys of a TCP connection; None: it has none.

    Attributes:
        sockets: readable when there is something to read.
        turned_away: whether the latest connection has ended before its handshake had.
    """

    def __init__(
        self, context: zmq.Context[Any], endpoint: str, curve: Curve | None = None
    ) -> None:
        self.turned_away = False
        self._socket = context.socket(zmq.DEALER)
        _set_options(self._socket)
        # Without a connection, messages wait with their sender, which merges them.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        first, longest = RECONNECT_MS
        self._socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS)
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        self._socket.setsockopt(zmq.RECONNECT_IVL, first)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, longest)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_DISCONNECTED
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | REFUSALS
        )
        self.sockets = self._socket, self._monitor
        self._endpoint = endpoint
        self._refused = self._told = False
        secure_to_connect(self._socket, endpoint, curve)
        self._socket.connect(endpoint)

    def read(self) -> list[memoryview]:
        """The frames that came; at most a batch."""
        frames: list[memoryview] = []
        for parts in _read_batch(self._socket):
            if len(parts) == 1:
                frames.append(parts[0].buffer)
            else:
                log.error("dropped a message of %s", counted(len(parts), "frame"))
        return frames

    def changes(self) -> list[bool]:
        """The changes since the last call: True if the connection was made, False if it was lost.
        Call this after `read`, whose frames came before the changes."""
        changes: list[bool] = []
        while readable(self._monitor):
            event, _ = next_event(self._monitor)
            if event == zmq.EVENT_DISCONNECTED:
                changes.append(False)
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                changes.append(True)
                self.turned_away = self._told = False
            else:
                self.turned_away = True
                self._refused = self._refused or bool(event & REFUSALS)
        return changes

    def retry(self) -> None:
        """Connects again where the other side has refused the connection, after which ZeroMQ does
        not. Call this now and then."""
        if self._refused:
            self._refused = False
            self._socket.disconnect(self._endpoint)  # ZeroMQ has, and remembers the endpoint
            self._socket.connect(self._endpoint)
            if not self._told:
                self._told = True
                log.warning("%s refuses this service: has it other keys, or none?", self._endpoint)

    def send(self, frame: bytes) -> bool:
        """Sends, or returns False."""
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
    """The side that binds.

    Args:
        curve: as for `Dealer`.

    Attributes:
        sockets: readable when there is something to read.

    Raises:
        EndpointTaken, EndpointUnusable: see `endpoints.bind`.
    """

    def __init__(
        self, context: zmq.Context[Any], endpoint: str, curve: Curve | None = None
    ) -> None:
        self._curve = curve
        self._releases: list[Callable[[], None]] = []
        self._socket = context.socket(zmq.ROUTER)
        _set_options(self._socket)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._connections = Connections(self._socket)
        self.sockets = self._socket, self._connections.monitor
        try:
            self.bind(endpoint)
        except OSError:
            self._close_sockets()
            raise

    def bind(self, endpoint: str) -> str:
        """Binds one more endpoint, and returns it with the port that the system has chosen if the
        port is 0. Raises like the constructor."""
        secure_to_bind(self._socket, endpoint, self._curve)
        self._releases.append(bind(endpoint, lambda: self._socket.bind(endpoint)))
        bound: bytes = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        return bound.rstrip(b"\0").decode()

    def read(self) -> tuple[list[bytes], list[tuple[bytes, memoryview]]]:
        """The routing ids of connections that have ended; and at most a batch of frames, each after
        its routing id. The last frames of the ended connections are among them."""
        batch = _read_batch(self._socket)
        ended = self._connections.closed()
        frames: list[tuple[bytes, memoryview]] = []
        for parts in batch:
            routing_id = parts[0].bytes
            if routing_id in ended or self._connections.opened(routing_id, parts[0]):
                if len(parts) == 2:
                    frames.append((routing_id, parts[1].buffer))
                else:
                    log.error("dropped a message of %s", counted(len(parts) - 1, "frame"))
        return ended, frames

    def send(self, routing_id: bytes, frame: bytes) -> bool:
        """Sends, or returns False."""
        try:
            self._socket.send(routing_id, _IDENTITY)
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
        for release in self._releases:
            release()

    def _close_sockets(self) -> None:
        self._socket.disable_monitor()
        self._connections.monitor.close(linger=0)
        self._socket.close(linger=200)


def _set_options(socket: zmq.Socket[bytes]) -> None:
    # The links bound what they send: see `connection`.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
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
