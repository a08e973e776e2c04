"""Peers without a right key: nothing of theirs is read, nothing is answered, nobody is harmed."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import zmq

from nanovllm import Client, SamplingParams
from nanovllm.control import IngressStats
from tests.keys.hostile import assert_nothing_is_answered
from tests.keys.locked import Locked

TIMEOUT_S = 120.0
HALF_OPEN = 3000
STREAM = SamplingParams(max_tokens=1500, ignore_eos=True, seed=1)
ROOT = Path(__file__).resolve().parents[2]


def ingress_of(locked: Locked) -> Path:
    (ingress,) = [s for s in locked.pipeline.status().services if s.role == "ingress"]
    return Path(f"/proc/{ingress.pid}")


def hostile(locked: Locked, half_open: int) -> list[str]:
    arguments = ["127.0.0.1", str(locked.port), str(half_open)]
    return [sys.executable, "-m", "tests.keys.hostile", *arguments]


def descriptors(process: Path) -> int:
    return len(list((process / "fd").iterdir()))


@pytest.fixture(scope="module")
def undisturbed(locked: Locked) -> str:
    with Client(locked.pipeline.endpoint, TIMEOUT_S) as local:
        return local.generate("Once", STREAM).text


def test_peers_without_a_key_get_nowhere(locked: Locked, undisturbed: str) -> None:
    """While a client with a key streams. (tests/machines does it from another machine.)"""
    process = ingress_of(locked)
    before = descriptors(process)
    finished = locked.pipeline.stats_once(IngressStats, lambda stats: stats.sessions == 0).finished
    with Client(locked.endpoint, TIMEOUT_S, keys=locked.client_key("amid-many")) as client:
        stream = client.generate("Once", STREAM, stream=True)
        next(stream)
        command = hostile(locked, HALF_OPEN)
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert ran.returncode == 0, ran.stderr
        assert stream.result().text == undisturbed
        stats = locked.pipeline.stats_once(IngressStats, lambda stats: True)
        assert (stats.sessions, stats.finished) == (1, finished + 1), "theirs are none"
    assert_nothing_is_answered(ran.stdout)
    locked.pipeline.stats_once(IngressStats, lambda stats: stats.sessions == 0)
    assert descriptors(process) <= before
    assert all(service.restarts == 0 for service in locked.pipeline.status().services)


def test_without_descriptors_nobody_else_gets_in_and_streams_go_on(
    locked: Locked, undisturbed: str
) -> None:
    process = ingress_of(locked)
    pid, key = int(process.name), locked.client_key("amid-few")
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    with Client(locked.endpoint, TIMEOUT_S, keys=key) as client:
        stream = client.generate("Once", STREAM, stream=True)
        next(stream)
        few = descriptors(process) + 20
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (few, limits[1]))
        try:
            with subprocess.Popen(hostile(locked, 40), cwd=ROOT, stdout=subprocess.DEVNULL):
                assert stream.result().text == undisturbed
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        assert client.ping().ready
    with Client(locked.endpoint, TIMEOUT_S, keys=key) as client:
        assert client.ping().ready
    assert ingress_of(locked) == process


@pytest.mark.parametrize("mechanism", ["NULL", "PLAIN", "CURVE"])
def test_libzmq_without_a_right_key_gets_nowhere(locked: Locked, mechanism: str) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    if mechanism == "PLAIN":
        dealer.plain_username, dealer.plain_password = b"admin", b"admin"
    elif mechanism == "CURVE":
        dealer.curve_serverkey = zmq.curve_keypair()[0]
        dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
    failures = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    monitor = dealer.get_monitor_socket(failures | zmq.EVENT_HANDSHAKE_SUCCEEDED)
    dealer.connect(locked.endpoint)
    dealer.send(b"\x81\xa4type\xa4ping")
    assert monitor.poll(int(TIMEOUT_S * 1000))
    assert int.from_bytes(monitor.recv_multipart()[0][:2], sys.byteorder) & failures
    assert not dealer.poll(0)
    monitor.close()
    context.destroy(linger=0)
