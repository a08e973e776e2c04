"""Endpoints: what may be one, how it is reached, and whether it is free."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zmq

from nanovllm.settings import Settings, SettingsError
from nanovllm.transport.endpoints import (
    LONGEST_IPC_PATH,
    EndpointTaken,
    EndpointUnusable,
    check_free,
    connectable,
    parse,
)

HOLDER = """
import sys, zmq
from nanovllm.transport.endpoints import bind
socket = zmq.Context().socket(zmq.ROUTER)
bind(sys.argv[1], lambda: socket.bind(sys.argv[1]))
print("bound", flush=True)
sys.stdin.read()
"""


def test_valid_endpoints_are_parsed() -> None:
    assert parse("tcp://127.0.0.1:5555") == ("127.0.0.1", 5555)
    assert parse("tcp://*:1") == ("", 1)
    assert parse("tcp://node-1.example:65535") == ("node-1.example", 65535)
    assert parse("ipc:///run/a b.sock") == "/run/a b.sock"
    assert parse("ipc://here.sock") == "here.sock"


@pytest.mark.parametrize(
    "endpoint",
    [
        *("foo", "inproc://x", "udp://127.0.0.1:5", "ipc:///" + "x" * 107),
        *("ipc://", "ipc://*", "ipc://@abstract", "tcp://", "tcp://:5", "tcp://127.0.0.1"),
        *("tcp://127.0.0.1:0", "tcp://127.0.0.1:*", "tcp://127.0.0.1:65536", "tcp://h:5555x"),
        *("tcp://h:+5", "tcp://h:5 ", "tcp://h:5\n", "tcp://a*:5", "tcp://[::1]:5", "tcp://a;b:5"),
    ],
)
def test_a_wrong_endpoint_is_refused_with_its_option(endpoint: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings(ingress=endpoint)
    assert str(caught.value).startswith(f"--ingress {endpoint}: ")


def test_the_longest_path_can_be_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    endpoint = "ipc://" + "x" * LONGEST_IPC_PATH
    parse(endpoint)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as bound:
        bound.bind(endpoint)


def test_every_interface_is_reached_at_this_machines_own_address() -> None:
    assert connectable("tcp://*:5560") == "tcp://127.0.0.1:5560"
    assert connectable("tcp://0.0.0.0:5560") == "tcp://127.0.0.1:5560"
    for endpoint in ("tcp://10.0.0.0:5560", "tcp://node:5560", "ipc:///tmp/*:1"):
        assert connectable(endpoint) == endpoint


@pytest.mark.parametrize("host", ["127.0.0.1", "*", "localhost"])
def test_a_port_is_taken_while_someone_listens_there(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(EndpointTaken, match=f"^tcp://.*:{port} is taken by another process"):
            check_free(f"tcp://{host}:{port}")
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # first, so that this end is the one that lingers
        client.close()
    check_free(f"tcp://{host}:{port}")
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_check_of_an_endpoint_does_not_listen_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a client that waits for a pipeline would connect, and lose its messages."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    listened: list[Any] = []
    monkeypatch.setattr(socket.socket, "listen", lambda *_: listened.append(_))
    check_free(f"tcp://127.0.0.1:{port}")
    assert not listened


def test_a_path_is_taken_as_long_as_its_holder_lives(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/a.sock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, endpoint],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "bound\n"
        with pytest.raises(EndpointTaken, match=f"^{endpoint} is taken by another process"):
            check_free(endpoint)
        holder.send_signal(signal.SIGKILL)
    assert os.listdir(tmp_path), "a killed process leaves its files"
    check_free(endpoint)
    assert os.listdir(tmp_path) == []


def test_a_file_that_is_no_socket_stays(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("dear")
    with pytest.raises(EndpointUnusable, match="no socket is there"):
        check_free(f"ipc://{notes}")
    assert notes.read_text() == "dear"
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_an_endpoint_that_cannot_be_bound_says_why(tmp_path: Path) -> None:
    with pytest.raises(EndpointUnusable, match=r"cannot be bound: No such file or directory$"):
        check_free(f"ipc://{tmp_path}/missing/a.sock")
    with pytest.raises(
        EndpointUnusable, match=r"cannot be bound: Cannot assign requested address$"
    ):
        check_free("tcp://192.0.2.1:5555")
    with pytest.raises(EndpointUnusable, match=r"^tcp://lo:5555 cannot be bound: "):
        check_free("tcp://lo:5555")
