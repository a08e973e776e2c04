"""A real ingress process: real sockets, clients, hostile ones among them."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import psutil
import pytest

from nanovllm.exit_codes import EXIT_MISCONFIGURED
from nanovllm.messages import Submit, unpack
from nanovllm.protocol import Accepted, Delta, Finish, Pong
from nanovllm.services.ingress.core import MAX_QUEUED_BYTES
from tests.ingress.harness import NOT_READY, READY, decoded
from tests.ingress.process import Client, Surroundings
from tests.peer import TIMEOUT_S, Neighbourhood


@pytest.fixture
def start() -> Iterator[Callable[..., Surroundings]]:
    with contextlib.ExitStack() as started:

        def start(**settings: Any) -> Surroundings:
            return started.enter_context(Surroundings(**settings))

        yield start


@pytest.fixture(scope="module")
def around() -> Iterator[Surroundings]:
    """One ingress for the tests that leave it as they found it."""
    with Surroundings() as surroundings:
        yield surroundings


def stream_to_its_end(around: Surroundings, client: Client, request_id: str) -> None:
    client.generate(request_id)
    (submit,) = around.started(1)
    around.until(lambda: client.of(Accepted))
    for offset in range(3):
        around.detokenizer.send(decoded(submit, offset, [offset], end=offset == 2))
    around.until(lambda: client.of(Finish))
    assert [t for d in client.of(Delta) for t in d.token_ids] == [0, 1, 2]
    around.until_withdrawn(submit)


def test_streaming(around: Surroundings) -> None:
    client = around.client()
    stream_to_its_end(around, client, "a")
    (accepted,) = client.of(Accepted)
    assert 0 <= accepted.seed < 2**53
    client.say({"type": "ping", "id": "p"})
    around.until(lambda: client.of(Pong))
    (pong,) = client.of(Pong)
    assert (pong.id, pong.session, pong.model) == ("p", accepted.session, "tiny-model")


def test_ready_follows_the_engine(around: Surroundings) -> None:
    client = around.client()
    assert client.ping().ready
    around.scheduler.send(NOT_READY)
    while client.ping().ready:
        pass
    around.scheduler.send(READY)
    while not client.ping().ready:
        pass


def test_clients_that_go_while_nothing_is_sent_to_them(around: Surroundings) -> None:
    queued, in_prefill, whole = around.client(), around.client(), around.client()
    in_prefill.generate("a")
    whole.generate("a", stream=False)
    started = around.started(2)
    queued.generate("a")
    before = len(around.tokenizes)
    around.until(lambda: len(around.tokenizes) == before + 1)
    for client in (queued, in_prefill, whole):
        client.close()
    around.until_withdrawn(*started)
    given = len(around.submits)
    # The queued one is tokenized in vain: the scheduler is given the next.
    around.answer(around.tokenizes[-1])
    stream_to_its_end(around, around.client(), "next")
    assert len(around.submits) == given + 1


# Sends its frames, so many times each, and goes in the midst of the answers.
FLOOD = """
import os, sys
from benchmarks.support.raw_client import RawClient
client = RawClient(sys.argv[1], SNDHWM=0, RCVHWM=0)
for times, frame in zip(sys.argv[2::2], sys.argv[3::2]):
    for _ in range(int(times)):
        client.send(bytes.fromhex(frame))
for _ in range(20):
    client.receive(20.0)
os._exit(0)
"""


def test_a_client_that_floods_and_goes(around: Surroundings) -> None:
    """The ingress would need many seconds for the frames. It drops them, serves other clients
    meanwhile, and does not abort (libzmq's heartbeats, see clients.py)."""
    other = around.client()
    ask = msgspec.msgpack.encode({"type": "generate", "id": "a", "prompt": "x"})
    flood = [sys.executable, "-c", FLOOD, around.endpoint, "1", ask.hex(), "200000", "05"]
    with subprocess.Popen(flood) as process:
        (submit,) = around.started(1)
        other.ping()
        around.until_withdrawn(submit)
        assert process.wait(TIMEOUT_S) == 0
    other.ping()
    assert around.process.poll() is None


ENDLESS = """
import msgspec, sys
from benchmarks.support.raw_client import RawClient
client = RawClient(sys.argv[1], SNDHWM=4)
ask = {"type": "generate", "id": "a", "prompt_token_ids": [70_000] * 1_600_000}
frame = msgspec.msgpack.encode(ask)
while True:
    client.send(frame)
"""


def test_a_client_that_sends_without_end_is_disconnected(
    start: Callable[..., Surroundings],
) -> None:
    """Though its frames take the ingress far longer than they take ZeroMQ, which would hold them
    all."""
    around = start()
    ingress = psutil.Process(around.process.pid)
    flood = subprocess.Popen([sys.executable, "-c", ENDLESS, around.endpoint])
    try:

        def disconnected() -> bool:
            assert ingress.memory_info().rss < 6 * MAX_QUEUED_BYTES
            return "sends more than can be taken in" in str(around)

        around.until(disconnected)
    finally:
        flood.kill()
        flood.wait(TIMEOUT_S)
    around.client().ping()


def test_hostile_frames_disturb_nobody(around: Surroundings) -> None:
    good, hostile = around.client(), around.client()
    good.generate("good")
    (submit,) = around.started(1)
    rng = random.Random(0)
    ask = msgspec.msgpack.encode({"type": "generate", "id": "h", "prompt": "x" * 50})
    frames = [b"", b"\xc1", b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"x" * ((8 << 20) + 1)]
    frames += [msgspec.msgpack.encode([5] * 20_000), b"\x82\xa4type\xa4ping\xa2id\xa2\xff\xfe"]
    frames += [rng.randbytes(rng.randint(1, 60)) for _ in range(100)]
    for number, frame in enumerate(frames):
        hostile.send(frame)
        hostile.send(b"envelope", frame[:100], ask)
        if number < 20:
            around.detokenizer.send(decoded(submit, number, [number]))
    hostile.send(b"", ask)  # as a REQ socket frames it
    hostile.say([ask], {"type": "pong"}, {"type": "ping", "id": "still here"})
    around.until(lambda: hostile.of(Pong))
    assert len(hostile.errors()) == 2 * len(frames) + 3
    assert set(hostile.errors()) == {(None, "invalid_request")}
    around.detokenizer.send(decoded(submit, 20, [20], end=True))
    around.until(lambda: good.of(Finish))
    assert [t for d in good.of(Delta) for t in d.token_ids] == list(range(21))
    assert good.errors() == []
    assert around.process.poll() is None


def test_a_frame_far_too_long_closes_the_connection(start: Callable[..., Surroundings]) -> None:
    around = start(max_message_bytes=1024)
    client = around.client(RECONNECT_IVL=50)
    client.generate("a")
    (submit,) = around.started(1)
    around.until(lambda: client.of(Accepted))
    client.send(b"x" * (8 * 1024 + 1))
    around.until_withdrawn(submit)
    assert client.ping().session != client.of(Accepted)[0].session


def test_a_new_scheduler_is_given_the_output_so_far(start: Callable[..., Surroundings]) -> None:
    around = start()
    client = around.client()
    client.generate("a", resume_token_ids=[7])
    (submit,) = around.started(1)
    around.detokenizer.send(decoded(submit, 1, [8, 9]))
    around.until(lambda: client.of(Delta))
    around.scheduler.come_back(reborn=True)
    again = around.scheduler.expect(Submit)
    assert (again.uid, again.attempt, again.resumed) == (submit.uid, 2, 1)
    assert unpack(again.output).tolist() == [7, 8, 9]
    around.detokenizer.send(decoded(again, 1, [8, 9, 10], end=True))
    around.until(lambda: client.of(Finish))
    assert [t for d in client.of(Delta) for t in d.token_ids] == [8, 9, 10]


def test_it_ends_on_sigterm_and_leaves_no_socket(start: Callable[..., Surroundings]) -> None:
    around = start()
    client = around.client()
    client.generate("a")
    around.started(1)
    around.process.send_signal(signal.SIGINT)
    client.ping()
    assert around.stop() == 0
    left = [path.name for path in around.runtime_dir.iterdir() if path.suffix != ".log"]
    assert [name for name in left if name.startswith(("ingress", "services"))] == []


def test_an_endpoint_that_is_taken_or_cannot_be_bound_is_one_clear_line(
    around: Surroundings,
) -> None:
    code, output = around.ended(around.start("ingress"))
    assert (code, output.count("\n")) == (EXIT_MISCONFIGURED, 1)
    assert "taken by another process" in output
    with Neighbourhood(ingress="tcp://192.0.2.1:5", insecure=True) as elsewhere:
        code, output = elsewhere.ended(elsewhere.start("ingress"))
    assert (code, output.count("\n")) == (EXIT_MISCONFIGURED, 1)
    assert "tcp://192.0.2.1:5 cannot be bound" in output
