"""Links between services over TCP: only the key of the services opens them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from nanovllm.keys import PipelineKeys, client_keys, make_keys
from nanovllm.messages import GroupReady, SchedulerToWorker, WorkerToScheduler
from nanovllm.transport.curve import Curve, Gate
from nanovllm.transport.links import BoundLink, ConnectedLink, Peer, Received, Up
from tests.readers import free_tcp_endpoint
from tests.transport.test_links import TIMEOUT_S, events_until, has

SCHEDULER, WORKER = Peer("scheduler", 0, 101), Peer("gpu_worker", 0, 202)
STRANGER = Peer("gpu_worker", 0, 303)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("keys")
    make_keys(directory, "alice")
    return directory


@pytest.fixture
def context(directory: Path) -> Iterator[zmq.Context[Any]]:
    """With the gate of a service."""
    context: zmq.Context[Any] = zmq.Context()
    gate = Gate(context, PipelineKeys(str(directory)).trusted)
    yield context
    gate.close()
    context.destroy(linger=0)


def bound(
    context: zmq.Context[Any], endpoint: str, curve: Curve | None
) -> BoundLink[WorkerToScheduler]:
    return BoundLink(context, endpoint, SCHEDULER, list[WorkerToScheduler], curve)


def connected(
    context: zmq.Context[Any], endpoint: str, curve: Curve | None, me: Peer = WORKER
) -> ConnectedLink[SchedulerToWorker]:
    return ConnectedLink(context, endpoint, me, list[SchedulerToWorker], curve)


def wait_until_refused(link: ConnectedLink[SchedulerToWorker]) -> Peer | None:
    """Returns who has welcomed the link in the meantime."""
    _, monitor = link.sockets
    if not monitor.poll(TIMEOUT_S * 1000):
        raise TimeoutError("the link was neither refused nor welcomed")
    link.receive()
    return link.peer


def test_services_with_their_key_meet_and_others_do_not(
    context: zmq.Context[Any], directory: Path
) -> None:
    endpoint, services = free_tcp_endpoint(), PipelineKeys(str(directory)).services
    alice = client_keys(endpoint, str(directory / "clients" / "alice.key"))
    assert alice is not None
    binder = bound(context, endpoint, services)
    own = Curve(alice.own, services.server, "services")
    strangers = [connected(context, endpoint, curve, STRANGER) for curve in (None, alice, own)]
    refused = [wait_until_refused(link) for link in strangers]
    assert refused == [None, None, None], "nobody has welcomed them"
    connector = connected(context, endpoint, services)
    events_until(has(Up), connector, binder, *strangers)
    assert connector.send([GroupReady(1, 4)])
    got, *_ = events_until(has(Received), binder, connector, *strangers)
    assert [event.peer for event in got] == [WORKER]
    assert binder.peers == [WORKER]


def test_without_a_gate_nobody_gets_in(directory: Path) -> None:
    context: zmq.Context[Any] = zmq.Context()
    endpoint, services = free_tcp_endpoint(), PipelineKeys(str(directory)).services
    binder = bound(context, endpoint, services)
    connector = connected(context, endpoint, services)
    assert wait_until_refused(connector) is None
    assert binder.receive() == []
    context.destroy(linger=0)


def test_services_find_each_other_after_a_refusal(
    context: zmq.Context[Any], directory: Path
) -> None:
    """libzmq itself does not try again."""
    endpoint, services = free_tcp_endpoint(), PipelineKeys(str(directory)).services
    other: zmq.Context[Any] = zmq.Context()
    without_keys = bound(other, endpoint, None)
    connector = connected(context, endpoint, services)
    wait_until_refused(connector)
    without_keys.close()
    other.term()
    binder = bound(context, endpoint, services)
    connector.heartbeat()
    events, _ = events_until(has(Up), connector, binder)
    assert events == [Up(SCHEDULER)]
