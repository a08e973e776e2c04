"""Wires without a thread in between: stream sockets that the service's own thread reads and writes.

ZeroMQ hands each message to a thread of its own, which hands it to the other side's thread: three
wake-ups where one would do, at 20 to 30 µs each. The device waits for the hops between scheduler
and worker, so those go straight. The endpoint says so: `direct+ipc://` or `direct+tcp://`.

A frame travels behind its length. What the kernel's buffer does not take of one is kept, and
written as soon as there is room; until then no other is taken.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import select
import socket
import struct
import time

from nanovllm.endpoints import DIRECT, bind, parse
from nanovllm.timer import Timer
from nanovllm.wires import RECONNECT_MS, ZMTP_HEARTBEAT_MS, ZMTP_TIMEOUT_MS, Frame, Route

_LENGTH = struct.Struct("<I")
# Nobody sends more; a stranger's first bytes may say so.
MAX_FRAME_BYTES = 1 << 30
_READ_BYTES = 1 << 16
_IN, _OUT = select.EPOLLIN, select.EPOLLOUT


class _Stream:
    """One connection, being made or made.

    Every method may raise OSError: then the connection has ended.
    """

    def __init__(self, connection: socket.socket, poll: select.epoll) -> None:
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            _set_tcp_options(connection)
        self._socket = connection
        self._poll = poll
        self._read: list[bytes] = []
        self._held = 0
        self._needed = _LENGTH.size
        self._unsent = memoryview(b"")
        poll.register(connection, _IN | _OUT)

    def fileno(self) -> int:
        return self._socket.fileno()

    def made(self) -> None:
        """To be called when it can be written for the first time: raises if it was not made."""
        if error := self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, os.strerror(error))

    def read(self) -> list[Frame]:
        """The frames that are complete by now."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "closed by the other side")
        self._held += len(data)
        self._read.append(data)
        if self._held < self._needed:
            return []
        if len(self._read) > 1:
            data = b"".join(self._read)
        frames: list[Frame] = []
        at = 0
        while True:
            start = at + _LENGTH.size
            self._needed = _LENGTH.size
            if start <= len(data):
                (length,) = _LENGTH.unpack_from(data, at)
                if length > MAX_FRAME_BYTES:
                    raise ConnectionAbortedError(errno.ECONNABORTED, "this is no frame")
                self._needed += length
            if at + self._needed > len(data):
                break
            at += self._needed
            frames.append(data[start:at])
        self._held = len(data) - at
        self._read = [data[at:]] if self._held else []
        return frames

    def send(self, frame: bytes) -> bool:
        if self._unsent:
            return False
        data = _LENGTH.pack(len(frame)) + frame
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            return False
        if sent < len(data):
            self._unsent = memoryview(data)[sent:]
            self._poll.modify(self._socket, _IN | _OUT)
        return True

    def flush(self) -> None:
        """To be called when it can be written."""
        if self._unsent:
            with contextlib.suppress(BlockingIOError):
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        if not self._unsent:
            self._poll.modify(self._socket, _IN)

    def close(self) -> None:
        self._poll.unregister(self._socket)
        self._socket.close()


class DirectConnected:
    """Implements `wires.ConnectedWire`."""

    def __init__(self, endpoint: str) -> None:
        self._family, self._address = _parse(endpoint)
        self._poll = select.epoll()
        self._timer = Timer()
        self._poll.register(self._timer.descriptor, _IN)
        self.sockets = (self._poll.fileno(),)
        self._stream: _Stream | None = None
        self._connected = False
        self._changes: list[bool] = []
        self._wait_ms, self._longest_wait_ms = RECONNECT_MS
        self._connect()

    def read(self) -> list[Frame]:
        frames: list[Frame] = []
        for descriptor, events in self._poll.poll(0):
            if descriptor == self._timer.descriptor:
                self._timer.clear()
                self._connect()
            elif (stream := self._stream) is not None:
                try:
                    if events & _OUT:
                        self._writable(stream)
                    if events & ~_OUT:
                        frames += stream.read()
                except OSError:
                    self._lost(stream)
        return frames

    def changes(self) -> list[bool]:
        changes, self._changes = self._changes, []
        return changes

    def send(self, frame: bytes) -> bool:
        try:
            return self._connected and self._stream is not None and self._stream.send(frame)
        except OSError:
            return False  # the next read tells of it too

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._timer.close()
        self._poll.close()

    def _connect(self) -> None:
        connection = socket.socket(self._family, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            connection.connect(self._address)
        except OSError as error:
            if error.errno != errno.EINPROGRESS:
                connection.close()
                self._try_later()
                return
        self._stream = _Stream(connection, self._poll)

    def _writable(self, stream: _Stream) -> None:
        if not self._connected:
            stream.made()
            self._connected = True
            self._changes.append(True)
            self._wait_ms = RECONNECT_MS[0]
        stream.flush()

    def _lost(self, stream: _Stream) -> None:
        stream.close()
        self._stream = None
        if self._connected:
            self._connected = False
            self._changes.append(False)
        self._try_later()

    def _try_later(self) -> None:
        self._timer.set(time.monotonic() + self._wait_ms / 1000)
        self._wait_ms = min(2 * self._wait_ms, self._longest_wait_ms)


class DirectBound:
    """Implements `wires.BoundWire`.

    Raises:
        EndpointTaken, EndpointUnusable: see `endpoints.bind`.
    """

    def __init__(self, endpoint: str) -> None:
        family, address = _parse(endpoint)
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.setblocking(False)

        def do_bind() -> None:
            if isinstance(address, str):
                with contextlib.suppress(FileNotFoundError):  # of one that was killed
                    os.unlink(address)
            else:
                self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind(address)
            self._listener.listen()

        try:
            self._release = bind(endpoint, do_bind)
        except OSError:
            self._listener.close()
            raise
        self._poll = select.epoll()
        self._poll.register(self._listener, _IN)
        self.sockets = (self._poll.fileno(),)
        self._numbers = itertools.count()
        self._streams: dict[int, _Stream] = {}
        self._route_of: dict[int, int] = {}

    def read(self) -> tuple[list[Route], list[tuple[Route, Frame]]]:
        ended: list[Route] = []
        frames: list[tuple[Route, Frame]] = []
        for descriptor, events in self._poll.poll(0):
            route = self._route_of.get(descriptor)
            if route is None:
                self._accept()
                continue
            stream = self._streams[route]
            try:
                if events & _OUT:
                    stream.flush()
                if events & ~_OUT:
                    frames.extend((route, frame) for frame in stream.read())
            except OSError:
                del self._streams[route], self._route_of[descriptor]
                stream.close()
                ended.append(route)
        return ended, frames

    def send(self, route: Route, frame: bytes) -> bool:
        stream = self._streams.get(route) if isinstance(route, int) else None
        try:
            return stream is not None and stream.send(frame)
        except OSError:
            return False  # the next read tells of it too

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._poll.close()
        self._listener.close()
        self._release()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # it has gone already
        stream = _Stream(connection, self._poll)
        route = self._route_of[stream.fileno()] = next(self._numbers)
        self._streams[route] = stream


def _parse(endpoint: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    """Raises ValueError as `endpoints.parse` does."""
    address = parse(endpoint.removeprefix(DIRECT))
    return socket.AF_UNIX if isinstance(address, str) else socket.AF_INET, address


def _set_tcp_options(connection: socket.socket) -> None:
    """Small frames at once; and a cable that is pulled is noticed, whether or not anything is
    being sent."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, ZMTP_HEARTBEAT_MS // 1000)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, ZMTP_HEARTBEAT_MS // 1000)
    probes = (ZMTP_TIMEOUT_MS - ZMTP_HEARTBEAT_MS) // ZMTP_HEARTBEAT_MS
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, probes)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, ZMTP_TIMEOUT_MS)
