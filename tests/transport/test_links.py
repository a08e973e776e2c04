"""Links over real sockets: connections, dropped messages, peers that restart."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from zmq import zmq_poll

from nanovllm.messages import GroupReady, Reset, SchedulerToWorker, WorkerToScheduler
from nanovllm.transport.endpoints import EndpointTaken
from nanovllm.transport.links import BoundLink, ConnectedLink, Down, Peer, Received, Up
from nanovllm.transport.sockets import BATCH, Router
from tests.readers import free_tcp_endpoint

SCHEDULER = Peer("scheduler", 0, 101)
WORKER = Peer("gpu_worker", 0, 202)
TIMEOUT_S = 60.0
# To and from which incarnation, on which connection, and how many frames were read.
HEADER = struct.Struct("<QQIQ")


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture(params=["ipc", "tcp"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param.endswith("ipc"):
        return f"{request.param}://{tmp_path}/a.sock"
    return free_tcp_endpoint()


def bound(
    context: zmq.Context[Any], endpoint: str, me: Peer = SCHEDULER
) -> BoundLink[WorkerToScheduler]:
    return BoundLink(context, endpoint, me, list[WorkerToScheduler])


def connected(
    context: zmq.Context[Any], endpoint: str, me: Peer = WORKER
) -> ConnectedLink[SchedulerToWorker]:
    return ConnectedLink(context, endpoint, me, list[SchedulerToWorker])


def events_until(wanted: Callable[[list[Any]], bool], *links: Any) -> list[list[Any]]:
    """Polls the links until the events of the first satisfy `wanted`; the events of each."""
    seen: list[list[Any]] = [[] for _ in links]
    poller = zmq.Poller()
    for link in links:
        for polled in link.sockets:
            poller.register(polled, zmq.POLLIN)
    deadline = time.monotonic() + TIMEOUT_S
    while not wanted(seen[0]):
        if time.monotonic() > deadline:
            raise TimeoutError(f"events so far: {seen}")
        poller.poll(50)
        for events, link in zip(seen, links, strict=True):
            events.extend(link.receive())
    return seen


def has(kind: type) -> Callable[[list[Any]], bool]:
    return lambda events: any(isinstance(event, kind) for event in events)


def test_each_side_learns_of_the_other_and_messages_pass(
    context: zmq.Context[Any], endpoint: str
) -> None:
    binder, connector = bound(context, endpoint), connected(context, endpoint)
    assert not connector.send([GroupReady(1, 4)]), "nobody has welcomed it yet"
    up, at_binder = events_until(has(Up), connector, binder)
    assert up == [Up(SCHEDULER)]
    assert at_binder == [Up(WORKER)]
    assert connector.send([GroupReady(1, 4), GroupReady(2, 4)])
    got, _ = events_until(lambda events: len(events) == 2, binder, connector)
    assert [event.message for event in got] == [GroupReady(1, 4), GroupReady(2, 4)]
    assert binder.send(WORKER, [Reset(7)])
    (answer,), _ = events_until(has(Received), connector, binder)
    assert answer == Received(SCHEDULER, Reset(7))


def test_a_peer_of_another_pipeline_is_refused(
    context: zmq.Context[Any], endpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    binder = BoundLink(context, endpoint, SCHEDULER, list[WorkerToScheduler], agreement="ours")
    other = ConnectedLink(context, endpoint, WORKER, list[SchedulerToWorker], agreement="theirs")
    events_until(lambda _: "is refused" in caplog.text, binder, other)
    assert binder.peers == []
    same, told_nothing = Peer("gpu_worker", 1, 303), Peer("gpu_worker", 2, 404)
    links = [
        ConnectedLink(context, endpoint, same, list[SchedulerToWorker], agreement="ours"),
        ConnectedLink(context, endpoint, told_nothing, list[SchedulerToWorker]),
    ]
    events_until(lambda events: len(events) == 2, binder, *links)
    assert set(binder.peers) == {same, told_nothing}
    assert other.peer is None


def test_a_peer_that_closes_is_noticed_while_nothing_is_sent(
    context: zmq.Context[Any], endpoint: str
) -> None:
    binder, connector = bound(context, endpoint), connected(context, endpoint)
    events_until(has(Up), connector, binder)
    binder.receive()
    connector.close()
    (gone,) = events_until(has(Down), binder)
    assert gone[-1] == Down(WORKER)
    assert binder.peers == []
    assert not binder.send(WORKER, [Reset(1)])


def test_the_last_words_of_a_peer_come_before_its_end(
    context: zmq.Context[Any], endpoint: str
) -> None:
    """One wake-up reads them all, as in a process that was busy meanwhile."""
    binder = bound(context, endpoint)
    for incarnation in range(1, 20):
        its_context: zmq.Context[Any] = zmq.Context()
        connector = connected(its_context, endpoint, Peer("gpu_worker", 0, incarnation))
        events_until(has(Up), connector, binder)
        assert connector.send([GroupReady(incarnation, 4)])
        connector.close()
        its_context.term()
        assert zmq_poll([(binder.sockets[-1], zmq.POLLIN)], int(TIMEOUT_S * 1000))
        (got,) = events_until(has(Down), binder)
        me = Peer("gpu_worker", 0, incarnation)
        assert got == [Received(me, GroupReady(incarnation, 4)), Down(me)]


def test_a_reborn_binder_is_told_apart_and_gets_nothing_meant_for_the_old(
    context: zmq.Context[Any], endpoint: str
) -> None:
    its_context: zmq.Context[Any] = zmq.Context()
    binder, connector = bound(its_context, endpoint), connected(context, endpoint)
    events_until(has(Up), connector, binder)
    connector.send([GroupReady(1, 4)])
    binder.close()
    its_context.term()
    events_until(has(Down), connector)
    assert not connector.send([GroupReady(2, 4)]), (
        "what cannot be sent is not queued beside the socket"
    )
    reborn = bound(context, endpoint, Peer("scheduler", 0, 103))
    up, at_binder = events_until(has(Up), connector, reborn)
    assert up == [Up(Peer("scheduler", 0, 103))]
    assert at_binder == [Up(WORKER)]
    connector.send([GroupReady(3, 4)])
    got, _ = events_until(has(Received), reborn, connector)
    assert [event.message for event in got] == [GroupReady(3, 4)]


def test_a_reborn_connector_replaces_its_former_incarnation(
    context: zmq.Context[Any], endpoint: str
) -> None:
    binder, old = bound(context, endpoint), connected(context, endpoint)
    events_until(has(Up), old, binder)
    binder.receive()
    reborn = Peer("gpu_worker", 0, 203)
    new = connected(context, endpoint, reborn)
    seen, _ = events_until(has(Up), binder, new)
    assert seen == [Down(WORKER), Up(reborn)]
    assert binder.peers == [reborn]


def test_late_frames_of_a_former_connection_do_not_end_the_present_one(
    context: zmq.Context[Any], endpoint: str
) -> None:
    """More than a batch of them, a hello last; and a third peer, which has their descriptor, has
    said nothing yet."""
    binder = bound(context, endpoint)

    def connect(*frames: bytes) -> zmq.Socket[bytes]:
        dealer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        dealer.connect(endpoint)
        assert zmq_poll([(monitor, zmq.POLLIN)], int(TIMEOUT_S * 1000))
        dealer.disable_monitor()
        for frame in frames:
            dealer.send(frame)
        return dealer

    def hello(connection: int) -> bytes:
        return (
            HEADER.pack(0, WORKER.incarnation, connection, 0)
            + b"\x93\xa5hello\x93\xaagpu_worker\0\0\x01"
        )

    def ready(connection: int) -> bytes:
        header = HEADER.pack(SCHEDULER.incarnation, WORKER.incarnation, connection, 0)
        return header + b"\x91\x93\xabgroup_ready\x01\x04"

    first = connect(hello(1))
    events_until(has(Up), binder)
    for frame in [*[ready(1)] * (3 * BATCH), hello(1)]:
        first.send(frame)
    first.close(linger=int(TIMEOUT_S * 1000))
    # The end of the connection is told when all its frames are in the ROUTER.
    assert zmq_poll([(binder.sockets[-1], zmq.POLLIN)], int(TIMEOUT_S * 1000))
    silent = connect()
    second = connect(hello(2))
    seen = events_until(has(Up), binder)[0]
    for _ in range(10):
        second.send(ready(2))
        seen += events_until(has(Received), binder)[0]
    assert [event for event in seen if not isinstance(event, Received)] == [
        Down(WORKER),
        Up(WORKER),
    ]
    assert binder.send(WORKER, [Reset(1)])
    silent.close()


def entries(thing: object) -> int:
    """How many entries the containers in `thing` have, and those of the project's objects in it."""
    total = 0
    for value in vars(thing).values():
        if isinstance(value, dict | list | set):
            total += len(value)
        elif type(value).__module__.startswith("nanovllm"):
            total += entries(value) if hasattr(value, "__dict__") else 0
    return total


def test_peers_that_are_gone_leave_next_to_nothing(
    context: zmq.Context[Any], endpoint: str
) -> None:
    """As commands are, each with an index of its own."""
    binder = bound(context, endpoint)
    before = entries(binder)
    for number in range(20):
        command = connected(context, endpoint, Peer("command", number, number + 1))
        events_until(has(Up), command, binder)
        command.close()
        events_until(has(Down), binder)
    assert entries(binder) < before + 10, "one for a descriptor, of which there are few"


def test_messages_before_a_hello_or_for_another_incarnation_are_dropped(
    context: zmq.Context[Any], endpoint: str
) -> None:
    binder = bound(context, endpoint)
    stranger = context.socket(zmq.DEALER)
    stranger.connect(endpoint)
    stranger.send(b"x")
    stranger.send(HEADER.pack(0, 0, 0, 0) + b"\xc1")
    stranger.send(HEADER.pack(0, 0, 0, 0) + b"\x93\xa5hello\x93\xa1\xff\0\0\x01")
    stranger.send(HEADER.pack(SCHEDULER.incarnation, 9, 0, 0) + b"\x91\x93\xabgroup_ready\x01\x04")
    stranger.send_multipart([b"a", b"b", b"c"])
    connector = connected(context, endpoint)
    events_until(has(Up), connector, binder)
    connector.send([GroupReady(5, 4)])
    seen, _ = events_until(has(Received), binder, connector)
    assert [event.message for event in seen if isinstance(event, Received)] == [GroupReady(5, 4)]
    stranger.close()


@pytest.mark.parametrize("malformed", [b"\xc1", b"\x92\xa7welcome\x93\xa1\xff\0\0"])
def test_a_malformed_welcome_is_dropped(
    context: zmq.Context[Any], tmp_path: Path, malformed: bytes
) -> None:
    endpoint = f"ipc://{tmp_path}/a.sock"
    impostor = Router(context, endpoint)
    connector = connected(context, endpoint)
    frames: list[Any] = []
    deadline = time.monotonic() + TIMEOUT_S
    while not frames:
        assert time.monotonic() < deadline, "it says no hello"
        connector.receive()
        _, frames = impostor.read()
    ((route, _hello),) = frames
    assert impostor.send(route, HEADER.pack(0, 9, 1, 0) + malformed)
    assert zmq_poll([(connector.sockets[0], zmq.POLLIN)], int(TIMEOUT_S * 1000))
    assert connector.receive() == []
    assert connector.peer is None
    connector.heartbeat()
    assert zmq_poll([(impostor.sockets[0], zmq.POLLIN)], int(TIMEOUT_S * 1000))
    assert [at for at, _ in impostor.read()[1]] == [route], "it is there, and says hello again"
    connector.close()
    impostor.close()


def test_a_live_ipc_endpoint_cannot_be_stolen(context: zmq.Context[Any], tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/a.sock"
    first = bound(context, endpoint)
    with pytest.raises(EndpointTaken, match="taken by another process"):
        bound(context, endpoint, Peer("scheduler", 0, 104))
    first.close()
    assert list(tmp_path.iterdir()) == []
    bound(context, endpoint, Peer("scheduler", 0, 105)).close()


def test_a_socket_bound_on_every_interface_can_be_connected_to(
    context: zmq.Context[Any],
) -> None:
    endpoint = free_tcp_endpoint().replace("127.0.0.1", "*")
    binder, connector = bound(context, endpoint), connected(context, endpoint)
    up, _ = events_until(has(Up), connector, binder)
    assert up == [Up(SCHEDULER)]


def test_a_taken_port_is_named(context: zmq.Context[Any]) -> None:
    holder = context.socket(zmq.ROUTER)
    port = holder.bind_to_random_port("tcp://127.0.0.1")
    with pytest.raises(EndpointTaken, match=f"127.0.0.1:{port}"):
        bound(context, f"tcp://127.0.0.1:{port}")
