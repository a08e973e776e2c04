"""What happens where a service does not read for long, and its peers go on sending or end."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from zmq import zmq_poll

from nanovllm.messages import GroupReady, Message, Reset, SchedulerToWorker, WorkerToScheduler
from nanovllm.transport import sockets
from nanovllm.transport.connection import WINDOW
from nanovllm.transport.links import BoundLink, ConnectedLink, Down, Link, Peer, Received, Up
from tests.transport.test_links import SCHEDULER, WORKER, events_until, has

TIMEOUT_S = 60
HEARTBEAT_MS = 100
SOON = f"""
import sys, time, zmq
from nanovllm.services.ingress import clients
from nanovllm.transport import sockets
sockets.ZMTP_HEARTBEAT_MS = clients.ZMTP_HEARTBEAT_MS = {HEARTBEAT_MS}
sockets.ZMTP_TIMEOUT_MS = {5 * HEARTBEAT_MS}
context = zmq.Context()
"""
# Reads nothing until its peer has ended and heartbeats were due; then all that there is.
LATE_READER = f"""
{SOON}
kind, endpoint = sys.argv[1:]
if kind == "client socket":
    reader = clients.ClientSocket(context, [endpoint], 1 << 20).socket
elif kind == "router":
    reader = sockets.Router(context, endpoint).sockets[0]
elif kind == "dealer":
    reader = sockets.Dealer(context, endpoint).sockets[0]
else:
    reader = context.socket(zmq.ROUTER)
    reader.setsockopt(zmq.RCVHWM, 4)
    if kind == "a mark and heartbeats":
        reader.setsockopt(zmq.HEARTBEAT_IVL, {HEARTBEAT_MS})
    reader.bind(endpoint)
print("there", flush=True)
sys.stdin.readline()
time.sleep({10 * HEARTBEAT_MS / 1000})
while reader.poll(200):
    reader.recv_multipart()
print("has read", flush=True)
"""
# A service with a link of either side.
SERVICE = f"""
{SOON}
from nanovllm.transport.links import BoundLink, ConnectedLink, Peer
links = [BoundLink(context, sys.argv[1], Peer("scheduler", 0, 101), list[int]),
         ConnectedLink(context, sys.argv[2], Peer("gpu_worker", 0, 202), list[int])]
while True:
    zmq.zmq_poll([(socket, zmq.POLLIN) for link in links for socket in link.sockets], 1000)
    for link in links:
        link.receive()
"""


@contextlib.contextmanager
def running(program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(TIMEOUT_S)


def handshake(peer: socket.socket, role: str) -> None:
    """The ZMTP handshake of a peer, without ZeroMQ."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(48)
    ready = b"\x05READY\x0bSocket-Type" + len(role).to_bytes(4, "big") + role.encode()
    peer.sendall(greeting + b"\x04" + bytes([len(ready)]) + ready)
    heard = b""
    while b"READY" not in heard:
        heard += peer.recv(1 << 12)
        assert heard


# More messages than the mark of 4,096 that links had, and a ping now and then.
MESSAGES = (b"\0\x01x" * 10 + b"\x04\x07\x04PING\0\x32") * 500


def end_of_a_reader(kind: str, path: Path) -> tuple[int, str]:
    """Exit code and last words of a reader whose peer has sent `MESSAGES`, and has ended."""
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(socket.socket(socket.AF_UNIX))
        peer.settimeout(TIMEOUT_S)
        if kind == "dealer":
            peer.bind(str(path))
            peer.listen()
        reader = stack.enter_context(running(LATE_READER, kind, f"ipc://{path}"))
        assert reader.stdout is not None
        assert reader.stdout.readline() == "there\n"
        if kind == "dealer":
            peer = stack.enter_context(peer.accept()[0])
        else:
            peer.connect(str(path))
        handshake(peer, "ROUTER" if kind == "dealer" else "DEALER")
        peer.sendall(MESSAGES)
        peer.close()
        words, _ = reader.communicate("go on\n", TIMEOUT_S)
        return reader.returncode, words


@pytest.mark.parametrize("kind", ["client socket", "router", "dealer"])
def test_a_peer_that_ends_while_nobody_reads_ends_nobody_else(kind: str, tmp_path: Path) -> None:
    assert end_of_a_reader(kind, tmp_path / "x") == (0, "has read\n")


@pytest.mark.parametrize("kind", ["a mark and heartbeats", "a mark and a ping"])
def test_this_libzmq_aborts_with(kind: str, tmp_path: Path) -> None:
    """If this fails, libzmq aborts no more, and receive queues may have high-water marks."""
    assert end_of_a_reader(kind, tmp_path / "x") == (-signal.SIGABRT, "")


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Iterator[zmq.Context[Any]]:
    monkeypatch.setattr(sockets, "ZMTP_HEARTBEAT_MS", HEARTBEAT_MS)
    monkeypatch.setattr(sockets, "ZMTP_TIMEOUT_MS", 5 * HEARTBEAT_MS)
    context: zmq.Context[Any] = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.mark.parametrize("reader", ["connects", "binds"])
def test_a_slow_reader_keeps_its_link_and_its_sender_keeps_the_rest(
    reader: str, context: zmq.Context[Any], tmp_path: Path
) -> None:
    endpoint = f"ipc://{tmp_path}/x"
    binder = BoundLink(context, endpoint, SCHEDULER, list[WorkerToScheduler])
    connector = ConnectedLink(context, endpoint, WORKER, list[SchedulerToWorker])
    events_until(has(Up), connector, binder)
    binder.receive()
    slow: Link = connector if reader == "connects" else binder
    other: Link = binder if slow is connector else connector
    sent = 0

    def message(number: int) -> Message:
        return Reset(number) if slow is connector else GroupReady(number, 4)

    def send() -> None:
        nonlocal sent
        messages = [message(sent)]
        sent += connector.send(messages) if slow is binder else binder.send(WORKER, messages)

    for _ in range(2 * WINDOW):
        send()
    assert sent == WINDOW
    monitors = [(link.sockets[-1], zmq.POLLIN) for link in (slow, other)]
    assert not zmq_poll(monitors, 20 * HEARTBEAT_MS), "a link was lost"
    read: list[Any] = []
    deadline = time.monotonic() + TIMEOUT_S
    while len(read) < 5 * WINDOW:
        assert time.monotonic() < deadline, f"{sent} were sent, {len(read)} read"
        if sent < 5 * WINDOW:
            send()
        read += slow.receive()
        other.receive()
    peer = SCHEDULER if slow is connector else WORKER
    assert read == [Received(peer, message(number)) for number in range(5 * WINDOW)]


def test_a_stopped_service_loses_its_links(context: zmq.Context[Any], tmp_path: Path) -> None:
    """The link that it binds, and the link that it has connected."""
    theirs, ours = f"ipc://{tmp_path}/theirs", f"ipc://{tmp_path}/ours"
    binder = BoundLink(context, ours, Peer("scheduler", 0, 303), list[WorkerToScheduler])
    connector = ConnectedLink(context, theirs, Peer("gpu_worker", 0, 404), list[SchedulerToWorker])
    with running(SERVICE, theirs, ours) as service:
        events_until(has(Up), binder)
        events_until(has(Up), connector)
        service.send_signal(signal.SIGSTOP)
        assert events_until(has(Down), binder)[0] == [Down(WORKER)]
        assert events_until(has(Down), connector)[0] == [Down(SCHEDULER)]
        service.send_signal(signal.SIGCONT)
        events_until(has(Up), binder)
        events_until(has(Up), connector)
