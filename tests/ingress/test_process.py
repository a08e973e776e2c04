"""A real ingress process: real sockets, clients, hostile ones among them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from nanovllm.messages import Refused, unpack
from nanovllm.protocol import Accepted, Delta, Finish, Pong, Usage
from tests.ingress.harness import NOT_READY, READY, decoded
from tests.ingress.process import TIMEOUT_S, Client, Surroundings


@pytest.fixture
def start() -> Iterator[Callable[..., Surroundings]]:
    started: list[Surroundings] = []

    def start(*arguments: str) -> Surroundings:
        started.append(Surroundings(*arguments))
        return started[-1]

    yield start
    for around in started:
        around.close()


@pytest.fixture(scope="module")
def around() -> Iterator[Surroundings]:
    """One ingress for the tests that leave it as they found it."""
    surroundings = Surroundings()
    yield surroundings
    surroundings.close()


def stream_to_its_end(around: Surroundings, client: Client, request_id: str) -> None:
    client.generate(request_id)
    (submit,) = around.started(1)
    around.wait(lambda: client.of(Accepted))
    for offset in range(3):
        around.detokenizer.send([decoded(submit, offset, [offset], end=offset == 2)])
    around.wait(lambda: client.of(Finish))
    assert [t for d in client.of(Delta) for t in d.token_ids] == [0, 1, 2]
    around.wait_ended(submit)


def test_streaming(around: Surroundings) -> None:
    client = around.client()
    stream_to_its_end(around, client, "a")
    (accepted,) = client.of(Accepted)
    assert 0 <= accepted.seed < 2**53
    client.say({"type": "ping", "id": "p"})
    around.wait(lambda: client.of(Pong))
    (pong,) = client.of(Pong)
    assert (pong.id, pong.session, pong.model) == ("p", accepted.session, "tiny-model")


def test_ready_follows_the_engine(around: Surroundings) -> None:
    client = around.client()
    assert client.ping(around).ready
    around.tell_state(NOT_READY)
    while client.ping(around).ready:
        pass
    around.tell_state(READY)
    while not client.ping(around).ready:
        pass


def test_a_whole_answer(around: Surroundings) -> None:
    client = around.client()
    client.generate("a", stream=False, sampling={"seed": 9, "logprobs": 0})
    (submit,) = around.started(1)
    around.detokenizer.send([decoded(submit, 0, [11]), decoded(submit, 1, [12], end=True)])
    around.wait_for_end(client)
    assert client.heard == [
        Finish(
            id="a",
            finish_reason="length",
            usage=Usage(3, 2, 2),
            text="12",
            token_ids=[11, 12],
            logprobs=[],
            seed=9,
        )
    ]
    around.wait_ended(submit)


def test_abort_duplicate_and_refusal(around: Surroundings) -> None:
    client = around.client()
    client.generate("a")
    (submit,) = around.started(1)
    client.generate("a")
    around.wait(client.errors)
    assert client.errors() == [("a", "duplicate_id")]
    client.say({"type": "abort", "id": "a"}, {"type": "abort", "id": "unknown"})
    around.wait(lambda: client.of(Finish))
    assert client.of(Finish)[0].finish_reason == "abort"
    around.wait_ended(submit)
    client.generate("long")
    around.wait(lambda: around.tokenizes[-1].uid != submit.uid)
    refused = around.tokenizes[-1]
    around.tokenizer.send([Refused(refused.uid, "context_length_exceeded", "too long")])
    around.wait(lambda: len(client.errors()) == 2)
    assert client.errors()[1] == ("long", "context_length_exceeded")
    assert len(client.of(Accepted)) == 1


def test_overloaded(start: Callable[..., Surroundings]) -> None:
    around = start("--max-pending-requests", "2")
    client = around.client()
    for request_id in "abc":
        client.generate(request_id)
    around.wait(client.errors)
    assert client.errors() == [("c", "overloaded")]


def test_clients_that_go_while_nothing_is_sent_to_them(around: Surroundings) -> None:
    queued, in_prefill, whole = around.client(), around.client(), around.client()
    in_prefill.generate("a")
    whole.generate("a", stream=False)
    started = around.started(2)
    queued.generate("a")
    before = len(around.tokenizes)
    around.wait(lambda: len(around.tokenizes) == before + 1)
    for client in (queued, in_prefill, whole):
        client.close()
    around.wait_ended(*started)
    given = len(around.submits)
    # The queued one is tokenized in vain: the scheduler is given the next.
    around.answer(around.tokenizes[-1])
    stream_to_its_end(around, around.client(), "next")
    assert len(around.submits) == given + 1


# Sends its frames, so many times each, and goes in the midst of the answers.
FLOOD = """
import os, sys, zmq
socket = zmq.Context().socket(zmq.DEALER)
socket.set_hwm(0)
socket.connect(sys.argv[1])
for times, frame in zip(sys.argv[2::2], sys.argv[3::2]):
    for _ in range(int(times)):
        socket.send(bytes.fromhex(frame))
for _ in range(20):
    socket.recv()
os._exit(0)
"""


def test_a_client_that_floods_and_goes(around: Surroundings) -> None:
    """What it sent would take the ingress many seconds; nobody waits for that, and it is no end of
    the ingress (libzmq's heartbeats, see clients.py)."""
    other = around.client()
    ask = msgspec.msgpack.encode({"type": "generate", "id": "a", "prompt": "x"})
    flood = [sys.executable, "-c", FLOOD, around.endpoint, "1", ask.hex(), "200000", "05"]
    with subprocess.Popen(flood) as process:
        (submit,) = around.started(1)
        other.ping(around)
        around.wait_ended(submit)
        assert process.wait(TIMEOUT_S) == 0
    other.ping(around)
    assert around.process.poll() is None


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
        hostile.socket.send(frame)
        hostile.socket.send_multipart([b"envelope", frame[:100], ask])
        if number < 20:
            around.detokenizer.send([decoded(submit, number, [number])])
    hostile.socket.send_multipart([b"", ask])  # as a REQ socket frames it
    hostile.say([ask], {"type": "pong"}, {"type": "ping", "id": "still here"})
    around.wait(lambda: hostile.of(Pong))
    assert len(hostile.errors()) == 2 * len(frames) + 3
    assert set(hostile.errors()) == {(None, "invalid_request")}
    around.detokenizer.send([decoded(submit, 20, [20], end=True)])
    around.wait(lambda: good.of(Finish))
    assert [t for d in good.of(Delta) for t in d.token_ids] == list(range(21))
    assert good.errors() == []
    assert around.process.poll() is None


def test_a_frame_far_too_long_closes_the_connection(start: Callable[..., Surroundings]) -> None:
    around = start("--max-message-bytes", "1024")
    client = around.client(RECONNECT_IVL=50)
    client.generate("a")
    (submit,) = around.started(1)
    around.wait(lambda: client.of(Accepted))
    client.socket.send(b"x" * (8 * 1024 + 1))
    around.wait_ended(submit)
    assert client.ping(around).session != client.of(Accepted)[0].session


def test_a_new_scheduler_is_given_the_output_so_far(start: Callable[..., Surroundings]) -> None:
    around = start()
    client = around.client()
    client.generate("a", resume_token_ids=[7])
    (submit,) = around.started(1)
    around.detokenizer.send([decoded(submit, 1, [8, 9])])
    around.wait(lambda: client.of(Delta))
    around.scheduler.close()
    around.scheduler = around.start_scheduler()
    around.wait(lambda: len(around.submits) == 2)
    again = around.submits[-1]
    assert (again.uid, again.attempt, again.resumed) == (submit.uid, 2, 1)
    assert unpack(again.output).tolist() == [7, 8, 9]
    around.detokenizer.send([decoded(again, 1, [8, 9, 10], end=True)])
    around.wait(lambda: client.of(Finish))
    assert [t for d in client.of(Delta) for t in d.token_ids] == [8, 9, 10]


def test_it_ends_on_sigterm_and_leaves_no_socket(start: Callable[..., Surroundings]) -> None:
    around = start()
    client = around.client()
    client.generate("a")
    around.started(1)
    around.process.send_signal(signal.SIGINT)
    client.ping(around)
    assert around.stop() == 0
    left = sorted(os.listdir(around.directory))
    assert [name for name in left if name.startswith(("ingress", "services"))] == []


def test_a_taken_endpoint_is_one_clear_line(around: Surroundings) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "nanovllm.services.ingress", *around.arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert second.returncode == 2
    (line,) = second.stderr.splitlines()
    assert "taken by another process" in line


def test_an_endpoint_that_cannot_be_bound_is_one_clear_line(
    around: Surroundings, tmp_path: Path
) -> None:
    second = subprocess.run(
        [
            *[sys.executable, "-m", "nanovllm.services.ingress", *around.arguments],
            *("--ingress", "tcp://192.0.2.1:5", "--runtime-dir", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert second.returncode == 2
    (line,) = second.stderr.splitlines()
    assert "tcp://192.0.2.1:5 cannot be bound" in line
