"""The links between services: one side binds, others connect, and each knows the other's
incarnation.

Every process draws an incarnation number when it starts. The side that connects says `Hello` when
its connection is made, again whenever the connection is made anew, and as a heartbeat. The binding
side answers `Welcome`. The header of each message names the incarnation that the message is meant
for, the incarnation that it comes from, and the connection. A message for or from an earlier
incarnation is dropped, and so is a message of an earlier connection, since a DEALER's queue is
delivered to a new ROUTER. So while a connection stands no message is lost. Around an `Up` the last
messages before it may be lost: the sender sends again what its peer still needs.

No call blocks, and no message is queued beside the sockets. If the peer is not there, or has not
read enough of what it was sent (`connection.WINDOW`), `send` returns False; the sender keeps the
messages, merges them and sends them later.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, Self, TypeVar

import msgspec
import zmq

from nanovllm.messages import Message
from nanovllm.names import ServiceId
from nanovllm.transport.connection import HEADER, Connection
from nanovllm.transport.curve import Curve
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

_TO_ANYONE = 0
_encoder = msgspec.msgpack.Encoder()


class Peer(msgspec.Struct, frozen=True):
    """One incarnation of a service."""

    role: str
    index: int
    incarnation: int
    engine: int = 0

    @classmethod
    def of(cls, service: ServiceId, incarnation: int) -> Self:
        return cls(service.role, service.index, incarnation, service.engine)

    @property
    def service(self) -> ServiceId:
        return ServiceId(self.role, self.index, self.engine)

    def __str__(self) -> str:
        return str(self.service)


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
    service: ServiceId
    pid: int
    agreement: str = ""


class _Welcome(msgspec.Struct, array_like=True, tag="welcome"):
    service: ServiceId


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
        except (ValueError, RecursionError) as error:
            log.error("dropped a malformed message from %s: %s", sender, error)
            return []


class ConnectedLink(Generic[M]):
    """The side that connects.

    Args:
        context: the process's ZeroMQ context.
        endpoint: where the other side binds, now or later.
        me: this process.
        inbound: `list[…]` of the message types that the other side sends.
        curve: the keys of a TCP connection; None: it has none.
        agreement: what both sides must have alike, see `agreement`.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: str,
        me: Peer,
        inbound: type[list[M]],
        curve: Curve | None = None,
        agreement: str = "",
    ) -> None:
        self._me = me
        self._agreement = agreement
        self._codec = _Codec(inbound)
        self._connection = Connection(0)
        self._connected = False
        self.peer: Peer | None = None
        self._dealer = Dealer(context, connectable(endpoint), curve)

    @property
    def sockets(self) -> tuple[Any, ...]:
        """Readable when there is something to receive."""
        return self._dealer.sockets

    @property
    def turned_away(self) -> bool:
        """Whether what listens there has ended the latest connection before it stood. It may have
        other keys, or have died."""
        return self._dealer.turned_away

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
        if self.peer is None or self._connection.full:
            return False
        sent = self._send(self.peer.incarnation, _encoder.encode(messages))
        self._connection.sent += sent
        return sent

    def heartbeat(self) -> None:
        self._dealer.retry()
        if self._connected:
            self._hello()

    def close(self) -> None:
        self._dealer.close()

    def _changed(self, connected: bool, events: list[Event[M]]) -> None:
        self._connected = connected
        if connected:
            self._connection = Connection(self._connection.number + 1)
            self._hello()
        elif self.peer is not None:
            events.append(Down(self.peer))
            self.peer = None

    def _hello(self) -> None:
        hello = _Hello(self._me.service, os.getpid(), self._agreement)
        self._send(_TO_ANYONE, _encoder.encode(hello))

    def _send(self, to: int, payload: bytes) -> bool:
        connection = self._connection
        sent = self._dealer.send(connection.header(to, self._me.incarnation) + payload)
        if sent:
            connection.told = connection.read
        return sent

    def _take(self, frame: memoryview, events: list[Event[M]]) -> None:
        if len(frame) < HEADER.size:
            log.error("dropped a message of %s", counted(len(frame), "byte"))
            return
        to, sender, number, read = HEADER.unpack_from(frame)
        payload = frame[HEADER.size :]
        connection, peer = self._connection, self.peer
        if number != connection.number or not self._connected:
            return  # of a connection that has ended since
        connection.confirmed = read
        if to == _TO_ANYONE:
            self._welcomed(payload, sender, events)
        elif payload and to == self._me.incarnation and peer and sender == peer.incarnation:
            events.extend(Received(peer, message) for message in self._codec.decode(payload, peer))
            if connection.has_read():
                self._send(peer.incarnation, b"")

    def _welcomed(self, payload: memoryview, sender: int, events: list[Event[M]]) -> None:
        try:
            welcome = _welcome_decoder.decode(payload)
        except (ValueError, RecursionError) as error:
            log.error("dropped a malformed welcome: %s", error)
            return
        if self.peer is not None and self.peer.incarnation == sender:
            return  # the answer to a heartbeat
        self.peer = Peer.of(welcome.service, sender)
        events.append(Up(self.peer))


class BoundLink(Generic[M]):
    """The side that binds: several peers, of several roles.

    Args:
        context: the process's ZeroMQ context.
        endpoint: what to bind.
        me: this process.
        inbound: `list[…]` of the message types that the peers send.
        curve: the keys of TCP connections; None: they have none.
        agreement: a peer that says another one is refused; one that says none, and any peer if
            this is empty, is not.

    Raises:
        EndpointTaken, EndpointUnusable: see `endpoints.bind`.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: str,
        me: Peer,
        inbound: type[list[M]],
        curve: Curve | None = None,
        agreement: str = "",
    ) -> None:
        self._me = me
        self._agreement = agreement
        self._refused: Peer | None = None  # the latest that was
        self._codec = _Codec(inbound)
        self._peers: dict[bytes, Peer] = {}
        self._routes: dict[Peer, Connection] = {}
        self.pids: dict[Peer, int] = {}
        self._router = Router(context, endpoint, curve)

    def bind(self, endpoint: str) -> str:
        """Binds one more endpoint, see `Router.bind`."""
        return self._router.bind(endpoint)

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
        if route is None or route.full:
            return False
        sent = self._send(route, peer.incarnation, _encoder.encode(messages))
        route.sent += sent
        return sent

    def heartbeat(self) -> None:
        """Nothing to do: the side that connects says hello."""

    def close(self) -> None:
        self._router.close()

    def _send(self, route: Connection, to: int, payload: bytes) -> bool:
        header = route.header(to, self._me.incarnation)
        sent = self._router.send(route.routing_id, header + payload)
        if sent:
            route.told = route.read
        return sent

    def _take(self, routing_id: bytes, frame: memoryview, events: list[Event[M]]) -> None:
        if len(frame) < HEADER.size:
            log.error("dropped a message of %s", counted(len(frame), "byte"))
            return
        to, sender, number, read = HEADER.unpack_from(frame)
        payload = frame[HEADER.size :]
        if to == _TO_ANYONE:
            self._greeted(Connection(number, routing_id, confirmed=read), sender, payload, events)
            return
        peer = self._peers.get(routing_id)
        if peer is None or to != self._me.incarnation or sender != peer.incarnation:
            return  # before its hello, or meant for an earlier incarnation
        route = self._routes[peer]
        route.confirmed = read
        if payload:
            events.extend(Received(peer, message) for message in self._codec.decode(payload, peer))
            if route.has_read():
                self._send(route, peer.incarnation, b"")

    def _greeted(
        self, route: Connection, incarnation: int, payload: memoryview, events: list[Event[M]]
    ) -> None:
        try:
            hello = _hello_decoder.decode(payload)
        except (ValueError, RecursionError) as error:
            log.error("dropped a malformed hello: %s", error)
            return
        peer = Peer.of(hello.service, incarnation)
        if self._agreement and hello.agreement and hello.agreement != self._agreement:
            if peer != self._refused:
                log.warning("%s is refused: its version, model or options are others", peer)
            self._refused = peer
            return
        known = self._routes.get(peer)
        if known is not None and known.is_same(route):
            known.confirmed = route.confirmed
            route = known
        else:
            for other in [p for p in self._routes if p.service == peer.service]:
                self._drop(self._routes[other].routing_id, events)
            self._drop(route.routing_id, events)
            self._peers[route.routing_id] = peer
            self._routes[peer] = route
            self.pids[peer] = hello.pid
            events.append(Up(peer))
        welcome = _Welcome(self._me.service)
        self._send(route, _TO_ANYONE, _encoder.encode(welcome))

    def _drop(self, routing_id: bytes, events: list[Event[M]]) -> None:
        peer = self._peers.pop(routing_id, None)
        if peer is not None:
            del self._routes[peer]
            del self.pids[peer]
            events.append(Down(peer))


Link = ConnectedLink[Any] | BoundLink[Any]
