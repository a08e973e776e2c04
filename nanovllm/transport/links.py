"""The links between services: one side binds, others connect, and each knows the other's
incarnation.

Every process draws an incarnation number when it starts. The side that connects says `Hello` when
its connection is made, again whenever the connection is made anew, and as a heartbeat. The binding
side answers `Welcome`. The header of each message names the incarnation that the message is meant
for, the incarnation that it comes from, and the connection. A message for or from an earlier
incarnation is dropped, and so is a message of an earlier connection, since a DEALER's queue is
delivered to a new ROUTER. So while a connection stands no message is lost. Around an `Up` the last
messages before it may be lost: the sender sends again what its peer still needs.

No call blocks, and no message is queued beside the sockets. If `send` could not send, it returns
False; the sender keeps the messages, merges them and sends them later.
"""

from __future__ import annotations

import logging
import os
import secrets
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec
import zmq

from nanovllm.messages import Message
from nanovllm.transport.endpoints import connectable
from nanovllm.transport.sockets import Dealer, Router
from nanovllm.wording import counted

log = logging.getLogger(__name__)

M = TypeVar("M")
T = TypeVar("T")

HEARTBEAT_S = 1.0
# A frame of messages that can be long holds about so much, or one message.
FRAME_BYTES = 1 << 20
# What a message takes beside its long fields, roughly.
MESSAGE_BYTES = 256

# In front of each payload: to which incarnation, from which incarnation, on which connection (a
# number that the connecting side gives it).
_HEADER = struct.Struct("<QQI")
_TO_ANYONE = 0
_encoder = msgspec.msgpack.Encoder()


class Peer(msgspec.Struct, frozen=True):
    """One incarnation of a service."""

    role: str
    index: int
    incarnation: int

    def __str__(self) -> str:
        return f"{self.role} {self.index}"


class Up(NamedTuple):
    """A connection to the peer was made: to another incarnation than before, or the same one."""

    peer: Peer


class Down(NamedTuple):
    """The connection to the peer is gone. The peer may still run."""

    peer: Peer


class Received(NamedTuple, Generic[M]):
    peer: Peer
    message: M


Event = Up | Down | Received[M]


class _Hello(msgspec.Struct, array_like=True, tag="hello"):
    role: str
    index: int
    pid: int


class _Welcome(msgspec.Struct, array_like=True, tag="welcome"):
    role: str
    index: int


def one_frame(items: Iterable[T], size: Callable[[T], int]) -> list[T]:
    """The first of `items` that fit one frame together; one at least, if there is one. `size` of an
    item is in bytes."""
    taken: list[T] = []
    total = 0
    for item in items:
        total += MESSAGE_BYTES + size(item)
        if taken and total > FRAME_BYTES:
            break
        taken.append(item)
    return taken


class _Route(NamedTuple):
    """One connection of a peer: the ROUTER's name for it, and the peer's number for it."""

    routing_id: bytes
    connection: int


_hello_decoder = msgspec.msgpack.Decoder(_Hello)
_welcome_decoder = msgspec.msgpack.Decoder(_Welcome)


def new_incarnation() -> int:
    """A random number that no earlier process has drawn: not 0, and of 31 bits, so that a uid that
    begins with it is an int64."""
    return secrets.randbelow(2**31 - 1) + 1


class _Codec(Generic[M]):
    """Lists of messages, decoded into their types."""

    def __init__(self, inbound: type[list[M]]) -> None:
        self._decoder = msgspec.msgpack.Decoder(inbound)

    def decode(self, payload: memoryview, sender: object) -> list[M]:
        try:
            return self._decoder.decode(payload)
        except (msgspec.DecodeError, RecursionError) as error:
            log.error("dropped a malformed message from %s: %s", sender, error)
            return []


class ConnectedLink(Generic[M]):
    """The side that connects.

    Args:
        context: the process's ZeroMQ context.
        endpoint: where the other side binds, now or later.
        me: this process.
        inbound: `list[…]` of the message types that the other side sends.
    """

    def __init__(
        self, context: zmq.Context[Any], endpoint: str, me: Peer, inbound: type[list[M]]
    ) -> None:
        self._me = me
        self._codec = _Codec(inbound)
        self._connection = 0
        self._connected = False
        self.peer: Peer | None = None
        self._dealer = Dealer(context, connectable(endpoint))

    @property
    def sockets(self) -> tuple[Any, ...]:
        """Readable when there is something to receive."""
        return self._dealer.sockets

    def receive(self) -> list[Event[M]]:
        """What has happened since; at most a batch. Never blocks."""
        events: list[Event[M]] = []
        # First the frames: a change came after them, or concerns a connection on which nothing was
        # answered yet.
        for frame in self._dealer.read():
            self._take(frame, events)
        for connected in self._dealer.changes():
            self._changed(connected, events)
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
        self._dealer.close()

    def _changed(self, connected: bool, events: list[Event[M]]) -> None:
        self._connected = connected
        if connected:
            self._connection += 1
            self._hello()
        elif self.peer is not None:
            events.append(Down(self.peer))
            self.peer = None

    def _hello(self) -> None:
        self._send(_TO_ANYONE, _Hello(self._me.role, self._me.index, os.getpid()))

    def _send(self, to: int, body: object) -> bool:
        header = _HEADER.pack(to, self._me.incarnation, self._connection)
        return self._dealer.send(header + _encoder.encode(body))

    def _take(self, frame: memoryview, events: list[Event[M]]) -> None:
        if len(frame) < _HEADER.size:
            log.error("dropped a message of %s", counted(len(frame), "byte"))
            return
        to, sender, connection = _HEADER.unpack_from(frame)
        payload = frame[_HEADER.size :]
        if connection != self._connection or not self._connected:
            return  # of a connection that has ended since
        if to == _TO_ANYONE:
            self._welcomed(payload, sender, events)
        elif to == self._me.incarnation and self.peer and sender == self.peer.incarnation:
            peer = self.peer
            events.extend(Received(peer, message) for message in self._codec.decode(payload, peer))

    def _welcomed(self, payload: memoryview, sender: int, events: list[Event[M]]) -> None:
        try:
            welcome = _welcome_decoder.decode(payload)
        except (msgspec.DecodeError, RecursionError) as error:
            log.error("dropped a malformed welcome: %s", error)
            return
        if self.peer is not None and self.peer.incarnation == sender:
            return  # the answer to a heartbeat
        self.peer = Peer(welcome.role, welcome.index, sender)
        events.append(Up(self.peer))


class BoundLink(Generic[M]):
    """The side that binds: several peers, of several roles.

    Args:
        context: the process's ZeroMQ context.
        endpoint: what to bind.
        me: this process.
        inbound: `list[…]` of the message types that the peers send.

    Raises:
        EndpointTaken, EndpointUnusable: see `endpoints.bind`.
    """

    def __init__(
        self, context: zmq.Context[Any], endpoint: str, me: Peer, inbound: type[list[M]]
    ) -> None:
        self._me = me
        self._codec = _Codec(inbound)
        self._peers: dict[bytes, Peer] = {}
        self._routes: dict[Peer, _Route] = {}
        self.pids: dict[Peer, int] = {}
        self._router = Router(context, endpoint)

    @property
    def sockets(self) -> tuple[Any, ...]:
        """Readable when there is something to receive."""
        return self._router.sockets

    @property
    def peers(self) -> list[Peer]:
        """Those who have said hello and are connected."""
        return list(self._routes)

    def receive(self) -> list[Event[M]]:
        """What has happened since; at most a batch. Never blocks."""
        events: list[Event[M]] = []
        ended, frames = self._router.read()
        for routing_id, frame in frames:
            # The last messages of a peer that has gone count; a hello would be too late.
            if routing_id not in ended or routing_id in self._peers:
                self._take(routing_id, frame, events)
        for routing_id in ended:
            self._drop(routing_id, events)
        return events

    def send(self, peer: Peer, messages: Sequence[Message]) -> bool:
        """Sends the messages in one frame; False if the peer is not there or is full."""
        route = self._routes.get(peer)
        if route is None:
            return False
        return self._send(route, peer.incarnation, messages)

    def heartbeat(self) -> None:
        """Nothing to do: the side that connects says hello."""

    def close(self) -> None:
        self._router.close()

    def _send(self, route: _Route, to: int, body: object) -> bool:
        header = _HEADER.pack(to, self._me.incarnation, route.connection)
        return self._router.send(route.routing_id, header + _encoder.encode(body))

    def _take(self, routing_id: bytes, frame: memoryview, events: list[Event[M]]) -> None:
        if len(frame) < _HEADER.size:
            log.error("dropped a message of %s", counted(len(frame), "byte"))
            return
        to, sender, connection = _HEADER.unpack_from(frame)
        payload = frame[_HEADER.size :]
        if to == _TO_ANYONE:
            self._greeted(_Route(routing_id, connection), sender, payload, events)
            return
        peer = self._peers.get(routing_id)
        if peer is None or to != self._me.incarnation or sender != peer.incarnation:
            return  # before its hello, or meant for an earlier incarnation
        events.extend(Received(peer, message) for message in self._codec.decode(payload, peer))

    def _greeted(
        self, route: _Route, incarnation: int, payload: memoryview, events: list[Event[M]]
    ) -> None:
        try:
            hello = _hello_decoder.decode(payload)
        except (msgspec.DecodeError, RecursionError) as error:
            log.error("dropped a malformed hello: %s", error)
            return
        peer = Peer(hello.role, hello.index, incarnation)
        if self._routes.get(peer) != route:
            service = (peer.role, peer.index)
            for other in [p for p in self._routes if (p.role, p.index) == service]:
                self._drop(self._routes[other].routing_id, events)
            self._drop(route.routing_id, events)
            self._peers[route.routing_id] = peer
            self._routes[peer] = route
            self.pids[peer] = hello.pid
            events.append(Up(peer))
        self._send(route, _TO_ANYONE, _Welcome(self._me.role, self._me.index))

    def _drop(self, routing_id: bytes, events: list[Event[M]]) -> None:
        peer = self._peers.pop(routing_id, None)
        if peer is not None:
            del self._routes[peer]
            del self.pids[peer]
            events.append(Down(peer))


Link = ConnectedLink[Any] | BoundLink[Any]
