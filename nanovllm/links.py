"""The links between services: one side binds, others connect, and each knows the other's life.

Every process draws an incarnation number when it starts. The side that connects says `Hello` when
its connection is made, again whenever it is made anew, and as a heartbeat; the binding side answers
`Welcome`. Each message names the incarnation it is meant for and the one it comes from, and what
was meant for, or sent by, an earlier life is dropped: a DEALER's queue is delivered to a reborn
ROUTER. An `Up` tells that the other side is there anew: all that was sent to it before may be lost,
so its receiver resends what it still owes.

What carries the frames is a wire: ZeroMQ sockets (`wires.py`), or a stream socket (`direct.py`).

Nothing here blocks and nothing is queued beside the sockets: `send` says whether it could, and
whoever could not keeps what it has to say and says it later, merged.
"""

from __future__ import annotations

import logging
import os
import secrets
import struct
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec
import zmq

from nanovllm.direct import DirectBound, DirectConnected
from nanovllm.endpoints import DIRECT, connectable
from nanovllm.messages import Message
from nanovllm.wires import BoundWire, ConnectedWire, Dealer, Frame, Route, Router
from nanovllm.wording import counted

log = logging.getLogger(__name__)

M = TypeVar("M")

HEARTBEAT_S = 1.0

# In front of each payload: to which incarnation, from which incarnation.
_HEADER = struct.Struct("<QQ")
_TO_ANYONE = 0
_encoder = msgspec.msgpack.Encoder()


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


class _Codec(Generic[M]):
    """Lists of messages, decoded into their types."""

    def __init__(self, inbound: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[list[M]] = msgspec.msgpack.Decoder(list[inbound])

    def decode(self, payload: Frame, sender: object) -> list[M]:
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
        inbound: the union of message types that the other side sends.
    """

    def __init__(self, context: zmq.Context[Any], endpoint: str, me: Peer, inbound: Any) -> None:
        self._me = me
        self._codec: _Codec[M] = _Codec(inbound)
        self._connection = 0
        self._connected = False
        self._known = 0
        self.peer: Peer | None = None
        endpoint = connectable(endpoint)
        self._wire: ConnectedWire = (
            DirectConnected(endpoint) if endpoint.startswith(DIRECT) else Dealer(context, endpoint)
        )

    @property
    def sockets(self) -> tuple[Any, ...]:
        """Readable (sockets or descriptors) when there is something to receive."""
        return self._wire.sockets

    def receive(self) -> list[Event[M]]:
        """What has happened since; at most a batch. Never blocks."""
        events: list[Event[M]] = []
        # First the frames: what has changed came after them, or else concerns a connection on
        # which nothing was answered yet.
        for frame in self._wire.read():
            self._take(frame, events)
        for connected in self._wire.changes():
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
        self._wire.close()

    def _changed(self, connected: bool, events: list[Event[M]]) -> None:
        self._connected = connected
        if connected:
            self._connection += 1
            self._hello()
        elif self.peer is not None:
            events.append(Down(self.peer))
            self.peer = None

    def _hello(self) -> None:
        hello = _Hello(self._me.role, self._me.index, os.getpid(), self._connection)
        self._send(_TO_ANYONE, hello)

    def _send(self, to: int, body: object) -> bool:
        return self._wire.send(_HEADER.pack(to, self._me.incarnation) + _encoder.encode(body))

    def _take(self, frame: Frame, events: list[Event[M]]) -> None:
        if len(frame) < _HEADER.size:
            log.error("dropped a message of %s", counted(len(frame), "byte"))
            return
        to, sender = _HEADER.unpack_from(frame)
        payload = frame[_HEADER.size :]
        if to == _TO_ANYONE:
            self._welcomed(payload, sender, events)
        elif to == self._me.incarnation and self.peer and sender == self.peer.incarnation:
            peer = self.peer
            events.extend(Received(peer, message) for message in self._codec.decode(payload, peer))

    def _welcomed(self, payload: Frame, sender: int, events: list[Event[M]]) -> None:
        try:
            welcome = _welcome_decoder.decode(payload)
        except (msgspec.DecodeError, RecursionError) as error:
            log.error("dropped a malformed welcome: %s", error)
            return
        if welcome.connection != self._connection:
            return  # an answer to a connection that has ended since
        if self.peer is not None and self.peer.incarnation == sender:
            return  # a heartbeat's
        self.peer = Peer(welcome.role, welcome.index, sender)
        events.append(Up(self.peer, reborn=sender != self._known))
        self._known = sender


class BoundLink(Generic[M]):
    """The side that binds: several peers, of several roles.

    Args:
        context: the process's ZeroMQ context.
        endpoint: what to bind.
        me: this process.
        inbound: the union of message types that the peers send.

    Raises:
        EndpointTaken, EndpointUnusable: see `endpoints.bind`.
    """

    def __init__(self, context: zmq.Context[Any], endpoint: str, me: Peer, inbound: Any) -> None:
        self._me = me
        self._codec: _Codec[M] = _Codec(inbound)
        self._peers: dict[Route, Peer] = {}
        self._routes: dict[Peer, Route] = {}
        self._lives: dict[tuple[str, int], int] = {}
        self.pids: dict[Peer, int] = {}
        self._wire: BoundWire = (
            DirectBound(endpoint) if endpoint.startswith(DIRECT) else Router(context, endpoint)
        )

    @property
    def sockets(self) -> tuple[Any, ...]:
        """Readable (sockets or descriptors) when there is something to receive."""
        return self._wire.sockets

    @property
    def peers(self) -> list[Peer]:
        """Those who have said hello and are connected."""
        return list(self._routes)

    def receive(self) -> list[Event[M]]:
        """What has happened since; at most a batch. Never blocks."""
        events: list[Event[M]] = []
        ended, frames = self._wire.read()
        for route, frame in frames:
            if route not in ended or route in self._peers:  # a peer's last words are believed
                self._take(route, frame, events)
        for route in ended:
            self._drop(route, events)
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
        self._wire.close()

    def _send(self, route: Route, to: int, body: object) -> bool:
        header = _HEADER.pack(to, self._me.incarnation)
        return self._wire.send(route, header + _encoder.encode(body))

    def _take(self, route: Route, frame: Frame, events: list[Event[M]]) -> None:
        if len(frame) < _HEADER.size:
            log.error("dropped a message of %s", counted(len(frame), "byte"))
            return
        to, sender = _HEADER.unpack_from(frame)
        payload = frame[_HEADER.size :]
        if to == _TO_ANYONE:
            self._greeted(route, sender, payload, events)
            return
        peer = self._peers.get(route)
        if peer is None or to != self._me.incarnation or sender != peer.incarnation:
            return  # before its hello, or meant for an earlier life
        events.extend(Received(peer, message) for message in self._codec.decode(payload, peer))

    def _greeted(
        self, route: Route, incarnation: int, payload: Frame, events: list[Event[M]]
    ) -> None:
        try:
            hello = _hello_decoder.decode(payload)
        except (msgspec.DecodeError, RecursionError) as error:
            log.error("dropped a malformed hello: %s", error)
            return
        peer = Peer(hello.role, hello.index, incarnation)
        if self._peers.get(route) != peer:
            place = (peer.role, peer.index)
            for other in [p for p in self._routes if (p.role, p.index) == place]:
                self._drop(self._routes[other], events)
            self._drop(route, events)
            self._peers[route] = peer
            self._routes[peer] = route
            self.pids[peer] = hello.pid
            events.append(Up(peer, reborn=self._lives.get(place) != incarnation))
            self._lives[place] = incarnation
        welcome = _Welcome(self._me.role, self._me.index, hello.connection)
        self._send(route, _TO_ANYONE, welcome)

    def _drop(self, route: Route, events: list[Event[M]]) -> None:
        peer = self._peers.pop(route, None)
        if peer is not None:
            del self._routes[peer]
            del self.pids[peer]
            events.append(Down(peer))


Link = ConnectedLink[Any] | BoundLink[Any]
