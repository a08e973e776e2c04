"""Which frames are believed where a descriptor is used again; the ROUTER is played by the test."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, cast

import pytest
import zmq

from nanovllm.transport.router_monitor import Connections

DESCRIPTOR = 9


class Router:
    """Its socket monitor, written by the test."""

    def __init__(self, context: zmq.Context[Any]) -> None:
        self.events = context.socket(zmq.PAIR)
        self.events.bind("inproc://monitor")
        self.monitor: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        self.monitor.connect("inproc://monitor")

    def get_monitor_socket(self, events: int) -> zmq.Socket[bytes]:
        return self.monitor

    def tell(self, *events: int) -> None:
        for event in events:
            self.events.send_multipart([struct.pack("=hi", event, DESCRIPTOR), b""])


class Frame:
    """A frame that came by DESCRIPTOR."""

    def get(self, option: int) -> int:
        assert option == zmq.SRCFD
        return DESCRIPTOR


FRAME = cast(zmq.Frame, Frame())
ACCEPTED, DISCONNECTED = zmq.EVENT_ACCEPTED, zmq.EVENT_DISCONNECTED


@pytest.fixture
def router() -> Iterator[Router]:
    context: zmq.Context[Any] = zmq.Context()
    yield Router(context)
    context.destroy(linger=0)


def numbered(number: int) -> bytes:
    return b"\x00" + (number % 2**32).to_bytes(4, "big")


@pytest.mark.parametrize("first", [7, 2**32 - 1])
def test_late_frames_of_the_old_connection_do_not_end_the_new_one(
    router: Router, first: int
) -> None:
    old, new = numbered(first), numbered(first + 1)
    connections = Connections(cast(Any, router))
    router.tell(ACCEPTED)
    assert connections.closed() == []
    assert connections.opened(old, FRAME)
    router.tell(DISCONNECTED, ACCEPTED)
    assert connections.closed() == [old]
    assert connections.opened(new, FRAME)
    assert not connections.opened(old, FRAME)
    assert connections.opened(new, FRAME)
    assert connections.closed() == []
    router.tell(DISCONNECTED)
    assert connections.closed() == [new]
    assert not connections.opened(new, FRAME)


def test_late_frames_of_the_old_connection_while_the_new_one_says_nothing(router: Router) -> None:
    old, new = numbered(2**32 - 1), numbered(2**32)
    connections = Connections(cast(Any, router))
    router.tell(ACCEPTED)
    connections.closed()
    assert connections.opened(old, FRAME)
    router.tell(DISCONNECTED, ACCEPTED)
    assert connections.closed() == [old]
    assert not connections.opened(old, FRAME)
    assert connections.opened(new, FRAME)
    assert connections.closed() == []


def test_an_old_connection_that_was_never_heard_of(router: Router) -> None:
    old, new = numbered(1), numbered(2)
    for order in ((old, new), (new, old)):
        connections = Connections(cast(Any, router))
        router.tell(ACCEPTED, DISCONNECTED, ACCEPTED)
        assert connections.closed() == []
        for routing_id in order:
            connections.opened(routing_id, FRAME)
        assert connections.opened(new, FRAME)
        assert not connections.opened(old, FRAME)
        assert connections.closed() == ([old] if order[0] == old else [])
        router.tell(DISCONNECTED)
        assert connections.closed() == [new]


def test_an_id_that_a_peer_has_chosen_disturbs_nobody(router: Router) -> None:
    connections = Connections(cast(Any, router))
    router.tell(ACCEPTED)
    connections.closed()
    assert connections.opened(b"mine", FRAME)
    router.tell(DISCONNECTED, ACCEPTED)
    assert connections.closed() == [b"mine"]
    assert connections.opened(numbered(3), FRAME)
    assert not connections.opened(b"mine", FRAME)
    assert connections.closed() == []
    router.tell(DISCONNECTED, ACCEPTED)
    assert connections.closed() == [numbered(3)]
    assert connections.opened(b"mine", FRAME)


def test_nothing_more_is_believed_of_a_connection_that_was_cut(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut: list[int] = []
    monkeypatch.setattr("nanovllm.transport.router_monitor._shut_down", cut.append)
    connections = Connections(cast(Any, router))
    router.tell(ACCEPTED)
    connections.closed()
    assert connections.opened(numbered(1), FRAME)
    connections.cut(numbered(1))
    assert cut == [DESCRIPTOR]
    assert not connections.opened(numbered(1), FRAME)
    router.tell(DISCONNECTED, ACCEPTED)
    assert connections.closed() == [numbered(1)]
    assert connections.opened(numbered(2), FRAME)
