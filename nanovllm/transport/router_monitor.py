"""Which connections of a ROUTER are open, and which have ended.

A ROUTER does not tell its owner that a peer has gone. The socket's monitor does, but names only a
file descriptor. A received frame names descriptor (ZMQ_SRCFD) and routing id, so the two can be
joined.

A descriptor is used again as soon as it is closed. The order in which ZeroMQ's I/O thread writes
tells the old connection from the new one: the end of the old and the start of the new are in the
monitor before the first frame of the new is in the socket. So a batch of frames is read first, then
the monitor is drained (`closed`), and only then are the frames looked at (`opened`).

A ROUTER reads its connections in turns. So the last frames of the old connection may be read after
the first frame of the new one; or before it, if the new peer says nothing for a while. Their
routing ids tell them apart: a ROUTER numbers them in order.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Container

import zmq

# As plain integers: enums are slow.
_POLLIN = int(zmq.POLLIN)
_SRCFD = int(zmq.SRCFD)
_EVENT = struct.Struct("=Hi")
WATCHED_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED


def readable(socket: zmq.Socket[bytes]) -> bool:
    """Whether a receive would succeed now."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & _POLLIN)


def next_event(monitor: zmq.Socket[bytes]) -> tuple[int, int]:
    """The event that a socket's monitor tells next, and its value: a descriptor, or an error.

    pyzmq has the same, in a module that loads asyncio: a tenth of a service's start.
    """
    event, value = _EVENT.unpack(monitor.recv_multipart()[0])
    return event, value


class Connections:
    """The live connections of one bound ROUTER socket, by descriptor and by routing id.

    Args:
        trusted: the public keys, in Z85, whose connections may stay; while it is or says None, all
            may. A connection without a key may stay.
    """

    def __init__(
        self,
        router: zmq.Socket[bytes],
        trusted: Callable[[], Container[bytes] | None] | None = None,
    ) -> None:
        self.monitor = router.get_monitor_socket(WATCHED_EVENTS)
        self._live: set[int] = set()
        self._routing_id: dict[int, bytes] = {}
        # Of the latest connection of each descriptor that has ended.
        self._ended: dict[int, bytes] = {}
        self._replaced: list[bytes] = []
        self._trusted = trusted
        self._keys: dict[bytes, bytes] = {}

    def closed(self) -> list[bytes]:
        """Drains the monitor: the routing ids of connections that ended since the last call."""
        gone, self._replaced = self._replaced, []
        while readable(self.monitor):
            event, descriptor = next_event(self.monitor)
            if event == zmq.EVENT_ACCEPTED:
                self._live.add(descriptor)
            else:
                self._live.discard(descriptor)
                routing_id = self._routing_id.pop(descriptor, None)
                if routing_id is not None:
                    gone.append(routing_id)
                    self._ended[descriptor] = routing_id
        for routing_id in gone:
            self._keys.pop(routing_id, None)
        return gone

    def opened(self, routing_id: bytes, frame: zmq.Frame) -> bool:
        """Notes that `frame` came from `routing_id`; False if that connection has ended since, or
        its key is not trusted any more."""
        descriptor = frame.get(_SRCFD)
        if not isinstance(descriptor, int) or descriptor not in self._live:
            return False
        ended = self._ended.get(descriptor)
        if ended is not None and _is_numbered(routing_id) and not _is_newer(routing_id, ended):
            return False
        other = self._routing_id.get(descriptor)
        if other == routing_id:
            return True
        if other is not None:
            if not _is_newer(routing_id, other):
                return False
            self._replaced.append(other)  # `other` ended before its first frame was looked at
        self._routing_id[descriptor] = routing_id
        return self._stays(routing_id, frame)

    def cut_untrusted(self) -> None:
        """Ends the connections whose keys were taken back."""
        if self._trusted is None or not self._keys or (trusted := self._trusted()) is None:
            return
        for routing_id in [one for one, key in self._keys.items() if key not in trusted]:
            self.cut(routing_id)

    def cut(self, routing_id: bytes) -> None:
        """Ends a connection, and drops the messages that ZeroMQ holds for its peer or from it. The
        next `closed` returns its routing id.

        Since the last `closed`, ZeroMQ may have closed the descriptor and given it to a new
        connection. Then the new connection is ended, and its peer connects again.
        """
        for descriptor, other in self._routing_id.items():
            if other == routing_id:
                _shut_down(descriptor)
                self._live.discard(descriptor)
                self._keys.pop(routing_id, None)
                return

    def _stays(self, routing_id: bytes, frame: zmq.Frame) -> bool:
        """Whether the key of a new connection is trusted; else the connection is ended."""
        if self._trusted is None or (key := _key(frame)) is None:
            return True
        self._keys[routing_id] = key
        trusted = self._trusted()
        if trusted is None or key in trusted:
            return True
        self.cut(routing_id)
        return False


def _shut_down(descriptor: int) -> None:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as ours:
        ours.shutdown(socket.SHUT_RDWR)


def _key(frame: zmq.Frame) -> bytes | None:
    """The public key of the peer that sent the frame, as the authenticator names the peer."""
    try:
        return str(frame.get("User-Id")).encode()
    except zmq.ZMQError:  # it came without a key
        return None


def _is_newer(routing_id: bytes, other: bytes) -> bool:
    """Whether a connection was made after another one.

    A ROUTER's own ids are a zero byte and a big-endian counter that wraps around. An id that a peer
    has chosen tells nothing about its age, so a ROUTER's own id counts as newer.
    """
    if not _is_numbered(routing_id):
        return not _is_numbered(other)
    if not _is_numbered(other):
        return True
    ahead = (int.from_bytes(routing_id, "big") - int.from_bytes(other, "big")) % 2**32
    return 0 < ahead < 2**31


def _is_numbered(routing_id: bytes) -> bool:
    return len(routing_id) == 5 and routing_id[0] == 0
