"""The links between services: DEALER connects, ROUTER binds, and each side knows the other's life.

Every process draws an incarnation number when it starts. The side that connects says `Hello` when
its connection is made, again whenever it is made anew, and as a heartbeat; the binding side answers
`Welcome`. Each message names the incarnation it is meant for and the one it comes from, and what
was meant for, or sent by, an earlier life is dropped: a DEALER's queue is delivered to a reborn
ROUTER. An `Up` tells that the other side is there anew: all that was sent to it before may be lost,
so its receiver resends what it still owes.

Nothing here blocks and nothing is queued beside the sockets: `send` says whether it could, and
whoever could not keeps what it has to say and says it later, merged.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import struct
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from nanovllm.connections import Connections, readable
from nanovllm.messages import Message

log = logging.getLogger(__name__)

M = TypeVar("M")

# Messages that one wake-up reads from one link at most, so that no link starves another.
BATCH = 256
HIGH_WATER_MARK = 4096
# A peer that is stopped, or whose cable is pulled, is noticed after this long. A busy one is not
# taken for it: ZeroMQ's own thread answers.
ZMTP_HEARTBEAT_MS = 1000
ZMTP_TIMEOUT_MS = 5000
HEARTBEAT_S = 1.0

# In front of each payload: to which incarnation, from which incarnation.
_HEADER = struct.Struct("<QQ")
_TO_ANYONE = 0
# As plain integers: enum arithmetic would cost more than the sends.
_DONTWAIT = int(zmq.DONTWAIT)
_IDENTITY = int(zmq.SNDMORE | zmq.DONTWAIT)
_encoder = msgspec.msgpack.Encoder()


class EndpointTaken(OSError):
    """Another process has bound this endpoint."""


class Peer(msgspec.Struct, frozen=True):
    """A process, in one of its lives."""

    role: str
    index: int
    incarnation: int

    def __str__(self) -> str:
        return f"{self.role} {self.index}"


class Up(NamedTuple):
    """The peer is there, for the first time or anew. `reborn`: in a life not seen before."""

    peer: Peer
    reborn: bool


class Down(NamedTuple):
    """The connection to the peer is gone; the peer may live."""

    peer: Peer


class Received(NamedTuple, Generic[M]):
    peer: Peer
    message: M


Event = Up | Down | Received[M]


class _Hello(msgspec.Struct, array_like=True, tag="hello"):
    role: str
    index: int
    pid: int
    connection: int


class _Welcome(msgspec.Struct, array_like=True, tag="welcome"):
    role: str
    index: int
    connection: int


_hello_decoder = msgspec.msgpack.Decoder(_Hello)
_welcome_decoder = msgspec.msgpack.Decoder(_Welcome)


def new_incarnation() -> int:
    """A number that no earlier life of any service has had: random, not 0, and of 31 bits, so that
    a uid that begins with it is an int64."""
    return secrets.randbelow(2**31 - 1) + 1


def bind(socket: zmq.Socket[bytes], endpoint: str) -> Callable[[], None]:
    """Binds; the returned function undoes what `unbind` would leave behind.

    A second bind on a live ipc path succeeds and steals it, so an ipc endpoint is held by a lock
    on a file beside it, which ends with the process however that ends.

    Raises:
        EndpointTaken: if another process has it.
        OSError: if it cannot be bound for another reason.
    """
    held: int | None = None
    path = endpoint.removeprefix("ipc://")
    if endpoint.startswith("ipc://"):
        held = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(held)
            raise EndpointTaken(f"{endpoint} is taken by another process") from None
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        if held is not None:
            os.close(held)
        if error.errno == zmq.EADDRINUSE:
            raise EndpointTaken(f"{endpoint} is taken by another process") from None
        raise OSError(error.errno, f"cannot bind {endpoint}: {error.strerror}") from None

    def release() -> None:
        if held is not None:
            for leftover in (path, f"{path}.lock"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(leftover)
            os.close(held)

    return release


class _Codec(Generic[M]):
    """Lists of messages, decoded into their types."""

    def __init__(self, inbound: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[list[M]] = msgspec.msgpack.Decoder(list[inbound])

    def decode(self, payload: memoryview, sender: object) -> list[M]:
        try:
            return self._decoder.decode(payload)
        except (msgspec.DecodeError, RecursionError) as error:
            log.error("dropped a malformed message from %s: %s", sender, error)
            return []


class ConnectedLink(Generic[M]):
    """The DEALER's side.

    Args:
        context: the process's ZeroMQ context.
        endpoint: where the other side binds, now or later.
        me: this process.
        inbound: the union of message types that the other side sends.
    """

    def __init__(self, context: zmq.Context[Any], endpoint: str, me: Peer, inbound: Any) -> None:
        self._me = me
        self._codec: _Codec[M] = _Codec(inbound)
        self._connection = 0
        self._connected = False
        self._known = 0
        self.peer: Peer | None = None
        self._socket = context.socket(zmq.DEALER)
        _set_options(self._socket)
        # Messages wait here, where they are merged, and not in a pipe to nobody.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        self._socket.connect(endpoint)

    @property
    def sockets(self) -> tuple[zmq.Socket[bytes], ...]:
        return (self._socket, self._monitor)

    def receive(self) -> list[Event[M]]:
        """What has happened since; at most a batch. Never blocks."""
        events: list[Event[M]] = []
        # First the frames: what the monitor has to say came after them, or else concerns a
        # connection on which nothing was answered yet.
        for parts in _read_batch(self._socket):
            self._take(parts, events)
        self._drain_monitor(events)
        return events

    def send(self, messages: Sequence[Message]) -> bool:
        """Sends the messages in one frame; False if the other side is not there or is full."""
        if self.peer is None:
            return False
        return self._send(self.peer.incarnation, messages)

    def heartbeat(self) -> None:
        if self._connected:
            self._hello()

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=200)

    def _drain_monitor(self, events: list[Event[M]]) -> None:
        while readable(self._monitor):
            event = parse_monitor_message(self._monitor.recv_multipart())
            if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._connected = True
                self._connection += 1
                self._hello()
            else:
                self._connected = False
                if self.peer is not None:
                    events.append(Down(self.peer))
                    self.peer = None

    def _hello(self) -> None:
        hello = _Hello(self._me.role, self._me.index, os.getpid(), self._connection)
        self._send(_TO_ANYONE, hello)

    def _send(self, to: int, body: object) -> bool:
        header = _HEADER.pack(to, self._me.incarnation)
        try:
            self._socket.send(header + _encoder.encode(body), _DONTWAIT)
        except zmq.Again:
            return False
        return True

    def _take(self, parts: list[zmq.Frame], events: list[Event[M]]) -> None:
        frame = parts[0].buffer
        if len(parts) != 1 or len(frame) < _HEADER.size:
            log.error("dropped a message of %d frames", len(parts))
            return
        to, sender = _HEADER.unpack_from(frame)
        payload = frame[_HEADER.size :]
        if to == _TO_ANYONE:
            self._welcomed(payload, sender, events)
        elif to == self._me.incarnation and self.peer and sender == self.peer.incarnation:
            peer = self.peer
            events.extend(Received(peer, message) for message in self._codec.decode(payload, peer))

    def _welcomed(self, payload: memoryview, sender: int, events: list[Event[M]]) -> None:
        welcome = _welcome_decoder.decode(payload)
        if welcome.connection != self._connection:
            return  # an answer to a connection that has ended since
        if self.peer is not None and self.peer.incarnation == sender:
            return  # a heartbeat's
        self.peer = Peer(welcome.role, welcome.index, sender)
        events.append(Up(self.peer, reborn=sender != self._known))
        self._known = sender


class BoundLink(Generic[M]):
    """The ROUTER's side: several peers, of several roles.

    Args:
        context: the process's ZeroMQ context.
        endpoint: what to bind.
        me: this process.
        inbound: the union of message types that the peers send.

    Raises:
        EndpointTaken, OSError: see `bind`.
    """

    def __init__(self, context: zmq.Context[Any], endpoint: str, me: Peer, inbound: Any) -> None:
        self._me = me
        self._codec: _Codec[M] = _Codec(inbound)
        self._peers: dict[bytes, Peer] = {}
        self._routes: dict[Peer, bytes] = {}
        self._lives: dict[tuple[str, int], int] = {}
        self.pids: dict[Peer, int] = {}
        self._socket = context.socket(zmq.ROUTER)
        _set_options(self._socket)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._connections = Connections(self._socket)
        try:
            self._release = bind(self._socket, endpoint)
        except OSError:
            self._close_sockets()
            raise

    @property
    def sockets(self) -> tuple[zmq.Socket[bytes], ...]:
        return (self._socket, self._connections.monitor)

    @property
    def peers(self) -> list[Peer]:
        """Those who have said hello and are connected."""
        return list(self._routes)

    def receive(self) -> list[Event[M]]:
        """What has happened since; at most a batch. Never blocks."""
        events: list[Event[M]] = []
        batch = _read_batch(self._socket)
        for routing_id in self._connections.closed():
            for parts in batch:
                if parts[0].bytes == routing_id and routing_id in self._peers:
                    self._take(routing_id, parts, events)  # its last words
            self._drop(routing_id, events)
        for parts in batch:
            routing_id = parts[0].bytes
            if self._connections.opened(routing_id, parts[0]):
                self._take(routing_id, parts, events)
        return events

    def send(self, peer: Peer, messages: Sequence[Message]) -> bool:
        """Sends the messages in one frame; False if the peer is not there or is full."""
        routing_id = self._routes.get(peer)
        if routing_id is None:
            return False
        return self._send(routing_id, peer.incarnation, messages)

    def heartbeat(self) -> None:
        """Nothing to do: the side that connects says hello."""

    def close(self) -> None:
        self._close_sockets()
        self._release()

    def _close_sockets(self) -> None:
        self._socket.disable_monitor()
        self._connections.monitor.close(linger=0)
        self._socket.close(linger=200)

    def _send(self, routing_id: bytes, to: int, body: object) -> bool:
        header = _HEADER.pack(to, self._me.incarnation)
        try:
            self._socket.send(routing_id, _IDENTITY)
            self._socket.send(header + _encoder.encode(body), _DONTWAIT)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False  # the monitor tells of it too, and `Down` follows
        return True

    def _take(self, routing_id: bytes, parts: list[zmq.Frame], events: list[Event[M]]) -> None:
        frame = parts[-1].buffer
        if len(parts) != 2 or len(frame) < _HEADER.size:
            log.error("dropped a message of %d frames", len(parts))
            return
        to, sender = _HEADER.unpack_from(frame)
        payload = frame[_HEADER.size :]
        if to == _TO_ANYONE:
            self._greeted(routing_id, sender, payload, events)
            return
        peer = self._peers.get(routing_id)
        if peer is None or to != self._me.incarnation or sender != peer.incarnation:
            return  # before its hello, or meant for an earlier life
        events.extend(Received(peer, message) for message in self._codec.decode(payload, peer))

    def _greeted(
        self, routing_id: bytes, incarnation: int, payload: memoryview, events: list[Event[M]]
    ) -> None:
        try:
            hello = _hello_decoder.decode(payload)
        except (msgspec.DecodeError, RecursionError) as error:
            log.error("dropped a malformed hello: %s", error)
            return
        peer = Peer(hello.role, hello.index, incarnation)
        if self._peers.get(routing_id) != peer:
            place = (peer.role, peer.index)
            for other in [p for p in self._routes if (p.role, p.index) == place]:
                self._drop(self._routes[other], events)
            self._drop(routing_id, events)
            self._peers[routing_id] = peer
            self._routes[peer] = routing_id
            self.pids[peer] = hello.pid
            events.append(Up(peer, reborn=self._lives.get(place) != incarnation))
            self._lives[place] = incarnation
        welcome = _Welcome(self._me.role, self._me.index, hello.connection)
        self._send(routing_id, _TO_ANYONE, welcome)

    def _drop(self, routing_id: bytes, events: list[Event[M]]) -> None:
        peer = self._peers.pop(routing_id, None)
        if peer is not None:
            del self._routes[peer]
            del self.pids[peer]
            events.append(Down(peer))


Link = ConnectedLink[Any] | BoundLink[Any]


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
