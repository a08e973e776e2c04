"""Stream sockets as wires: frames come whole and in order, however the kernel cuts them."""

from __future__ import annotations

import select
import socket
import struct
import time
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import given
from zmq import POLLIN, zmq_poll

from nanovllm.direct import MAX_FRAME_BYTES, DirectBound, DirectConnected, _Stream
from nanovllm.wires import Frame, Route

TIMEOUT_S = 10.0
# More than any kernel's buffer for a socket.
LARGE = bytes(range(256)) * 65536


def pair(tmp_path: Path) -> tuple[DirectBound, DirectConnected, Route]:
    """Both ends of a connection, and what the binding one calls it: a first frame tells."""
    endpoint = f"direct+ipc://{tmp_path}/a.sock"
    binder, connector = DirectBound(endpoint), DirectConnected(endpoint)
    while not connector.changes():
        wait(connector)
        connector.read()
    assert connector.send(b"hello")
    ((route, frame),) = frames_at(binder, 1)
    assert frame == b"hello"
    return binder, connector, route


def wait(wire: DirectBound | DirectConnected) -> None:
    assert zmq_poll([(wire.sockets[0], POLLIN)], int(TIMEOUT_S * 1000)), "nothing has come"


def frames_at(binder: DirectBound, count: int) -> list[tuple[Route, Frame]]:
    frames: list[tuple[Route, Frame]] = []
    while len(frames) < count:
        wait(binder)
        frames += binder.read()[1]
    return frames


@given(
    frames=st.lists(st.binary(max_size=40), max_size=8),
    pieces=st.lists(st.integers(min_value=1, max_value=50)),
)
def test_frames_come_whole_however_they_are_cut(frames: list[bytes], pieces: list[int]) -> None:
    written = b"".join(struct.pack("<I", len(frame)) + frame for frame in frames)
    far, near = socket.socketpair()
    with far, select.epoll() as poll:
        stream = _Stream(near, poll)
        got: list[Frame] = []
        for piece in [*pieces, len(written)]:
            far.sendall(written[:piece])
            written = written[piece:]
            got += stream.read()
        assert got == frames
        stream.close()


def test_what_the_kernel_does_not_take_follows_and_meanwhile_nothing_else_is_taken(
    tmp_path: Path,
) -> None:
    binder, connector, route = pair(tmp_path)
    assert connector.send(LARGE)
    assert not connector.send(b"too early")
    assert binder.send(route, LARGE[::-1])
    assert not binder.send(route, b"too early")
    at_binder: list[Frame] = []
    at_connector: list[Frame] = []
    deadline = time.monotonic() + TIMEOUT_S
    while not (at_binder and at_connector):
        assert time.monotonic() < deadline
        at_binder += [frame for _, frame in binder.read()[1]]
        at_connector += connector.read()
    assert (at_binder, at_connector) == ([LARGE], [LARGE[::-1]])
    assert connector.send(b"next")
    assert frames_at(binder, 1) == [(route, b"next")]
    connector.close()
    binder.close()


def test_who_sends_no_frames_is_cut_off_and_harms_no_one(tmp_path: Path) -> None:
    binder, connector, route = pair(tmp_path)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(f"{tmp_path}/a.sock")
        stranger.sendall(struct.pack("<I", MAX_FRAME_BYTES + 1))
        ended: list[Route] = []
        while not ended:
            wait(binder)
            ended, _ = binder.read()
        assert ended != [route]
        stranger.settimeout(TIMEOUT_S)
        assert stranger.recv(1) == b"", "its connection was closed"
    assert connector.send(b"still here")
    assert frames_at(binder, 1) == [(route, b"still here")]
    connector.close()
    binder.close()


def test_the_path_of_one_that_was_killed_is_taken_over(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(f"{tmp_path}/a.sock")
    binder, connector, _ = pair(tmp_path)
    connector.close()
    binder.close()
    assert list(tmp_path.iterdir()) == []
