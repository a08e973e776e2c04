"""The core in memory: sessions, attempts, delivery, and what is freed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.control import IngressStats
from nanovllm.messages import (
    Admitted,
    EngineState,
    HandedOn,
    Refused,
    Tokenize,
    TokenLogprobs,
    unpack,
)
from nanovllm.protocol import Accepted, Delta, Error, Finish, Pong, Usage
from nanovllm.services.ingress import core
from nanovllm.services.ingress.core import MAX_FULL_S, MAX_QUEUED_BYTES, MAX_UNREAD_BYTES
from nanovllm.services.ingress.dispatch import ADMISSION_TIMEOUT_S, WINDOW
from nanovllm.services.ingress.frames import FRAMING
from nanovllm.transport.links import Peer
from tests.ingress.harness import (
    CLIENT,
    DETOKENIZER,
    INCARNATION,
    SCHEDULER,
    TOKENIZER,
    World,
    decode,
    delta,
)

SECOND = Peer("tokenizer", 1, 21)
OTHER = b"\x00cli2"
SESSION = "0abcdef0-1"


def test_a_stream_from_request_to_finish() -> None:
    world = World()
    world.generate("a", sampling={"max_tokens": 10**18, "stop_token_ids": [5, 3, 5]})
    (tokenize,) = world.tokenizes()
    assert tokenize.uid == INCARNATION << 32 | 1
    assert (tokenize.attempt, tokenize.text, tokenize.max_tokens) == (1, "x", 64)
    assert unpack(tokenize.stop_token_ids).tolist() == [3, 5]
    assert tokenize.sampling.seed == 4242
    assert world.heard() == [], "not accepted before the tokenizer has handed it on"
    world.core.from_tokenizer(HandedOn(tokenize.uid, 1, 1, SCHEDULER.incarnation), now=0.0)
    assert world.heard() == [Accepted(id="a", session=SESSION, seed=4242)]
    world.core.from_scheduler(Admitted(tokenize.uid, 1))
    world.core.from_detokenizer(delta(tokenize, 0, [11]))
    world.core.from_detokenizer(delta(tokenize, 1, [12, 13]))
    assert world.heard() == [Delta(id="a", offset=0, token_ids=[11, 12, 13], text="123")]
    world.core.from_detokenizer(delta(tokenize, 3, [14], end=True))
    assert world.core.ends == set(), "the end is told when the finish is delivered"
    assert world.heard() == [
        Delta(id="a", offset=3, token_ids=[14], text="4"),
        Finish(id="a", finish_reason="length", usage=Usage(3, 4, 2)),
    ]
    assert world.core.ends == {tokenize.uid}
    assert (world.core.stats.requests, world.core.stats.finished) == (0, 1)
    world.generate("a")
    assert len(world.tokenizes()) == 1, "the id is free again"


def test_finish_without_stream_carries_everything() -> None:
    world = World()
    (tokenize,) = world.start("a", stream=False, resume_token_ids=[8, 9], sampling={"seed": 1})
    assert unpack(tokenize.output).tolist() == [8, 9]
    assert tokenize.resumed == 2
    world.core.from_detokenizer(delta(tokenize, 2, [11]))
    assert world.heard() == []
    world.core.from_detokenizer(delta(tokenize, 3, [12], end=True))
    assert world.heard() == [
        Finish(
            id="a",
            finish_reason="length",
            usage=Usage(3, 4, 2),
            text="12",
            token_ids=[11, 12],
            seed=1,
        )
    ]


def test_a_refusal_comes_without_accepted() -> None:
    world = World()
    world.generate("a")
    (tokenize,) = world.tokenizes()
    world.core.from_tokenizer(Refused(tokenize.uid, 1, "invalid_request", "no template"), now=0.0)
    assert world.heard() == [Error(id="a", code="invalid_request", message="no template")]
    assert world.core.ends == set()
    assert world.core.stats.requests == 0


def test_a_duplicate_concerns_the_refused_message_alone() -> None:
    world = World()
    world.generate("a")
    world.generate("a")
    world.generate("a", client=OTHER)
    (error,) = world.heard()
    assert isinstance(error, Error)
    assert (error.id, error.code) == ("a", "duplicate_id")
    assert len(world.tokenizes()) == 2
    assert world.heard(OTHER) == []


def test_overloaded() -> None:
    world = World(max_pending_requests=2)
    first, _ = world.start("a", "b")
    world.heard()
    world.generate("c")
    (error,) = world.heard()
    assert isinstance(error, Error)
    assert (error.id, error.code) == ("c", "overloaded")
    world.core.from_detokenizer(delta(first, 0, [1], end=True))
    world.heard()
    world.generate("c")
    assert world.heard() == []
    assert len(world.tokenizes()) == 1


def test_a_drain_refuses_what_is_new_and_takes_what_goes_on() -> None:
    world = World()
    world.core.drain()
    world.generate("new")
    world.generate("old", resume_token_ids=[7, 8])
    (error,) = world.heard()
    assert isinstance(error, Error)
    assert (error.id, error.code) == ("new", "overloaded")
    (tokenize,) = world.tokenizes()
    assert unpack(tokenize.output).tolist() == [7, 8]
    assert not world.core.drained


def test_abort_at_every_stage() -> None:
    for stage in ("waiting", "tokenizing", "handed on", "admitted", "running"):
        world = World(services=False)
        world.core.scheduler_up(SCHEDULER, reborn=True)
        world.generate("a", prompt=None, prompt_token_ids=[1, 2, 3], resume_token_ids=[7])
        uid = INCARNATION << 32 | 1
        if stage != "waiting":
            world.core.service_up(TOKENIZER)
            (tokenize,) = world.tokenizes()
        if stage in ("handed on", "admitted", "running"):
            world.core.from_tokenizer(HandedOn(uid, 1, 3, SCHEDULER.incarnation), now=0.0)
        if stage in ("admitted", "running"):
            world.core.from_scheduler(Admitted(uid, 1))
        if stage == "running":
            world.core.from_detokenizer(delta(tokenize, 1, [21]))
        world.heard()
        world.say({"type": "abort", "id": "nobody"}, {"type": "abort", "id": "a"})
        assert world.heard() == [
            Finish(
                id="a",
                finish_reason="abort",
                usage=Usage(3, 2 if stage == "running" else 1, 0),
            )
        ]
        assert world.core.ends == ({uid} if stage not in ("waiting", "tokenizing") else set())
        world.core.service_up(SECOND)
        assert world.tokenizes() == []
        assert world.tokenizes(SECOND) == []
        assert world.cancelled == ([uid] if stage == "tokenizing" else [])
        # What was under way comes back as if nothing had happened: it is ended.
        world.core.ends.clear()
        world.core.from_tokenizer(HandedOn(uid, 1, 3, SCHEDULER.incarnation), now=0.0)
        world.core.from_scheduler(Admitted(uid, 1))
        assert world.core.ends == {uid}
        assert world.heard() == []
        assert world.core.next_deadline is None


def test_ping() -> None:
    world = World()
    world.say({"type": "ping", "id": "p"}, {"type": "ping"})
    pong = Pong(id="p", session=SESSION, version="0.0", model="tiny", ready=True)
    assert world.heard() == [pong, msgspec.structs.replace(pong, id=None)]

    def ready() -> bool:
        world.say({"type": "ping"})
        (answer,) = world.heard()
        assert isinstance(answer, Pong)
        return answer.ready

    world.core.from_scheduler(EngineState(False))
    assert not ready()
    world.core.from_scheduler(EngineState(True))
    world.core.scheduler_down(SCHEDULER)
    assert not ready()
    world.core.scheduler_up(SCHEDULER, reborn=False)
    assert not ready(), "the engine's state is not known yet"
    world.core.from_scheduler(EngineState(True))
    world.core.service_down(DETOKENIZER)
    assert not ready()
    world.core.service_up(DETOKENIZER)
    world.core.service_down(TOKENIZER)
    assert not ready()


def test_any_other_framing_gets_one_error() -> None:
    world = World()
    array = msgspec.msgpack.encode([{"type": "ping"}, {"type": "ping"}])
    for frame in (None, array, b""):
        world.core.receive(CLIENT, frame)
        world.work()
        (error,) = world.heard()
        assert isinstance(error, Error)
        assert (error.id, error.code) == (None, "invalid_request")
        assert FRAMING in error.message


def test_a_client_that_goes_frees_everything() -> None:
    world = World()
    started = world.start("a", "b", stream=False)
    world.generate("c")
    (queued,) = world.tokenizes()
    world.core.closed(CLIENT)
    assert world.core.ends == {tokenize.uid for tokenize in started}
    world.tokenizes()
    assert world.cancelled == [queued.uid]
    stats = world.core.stats
    assert (stats.sessions, stats.requests) == (0, 0)
    assert not world.core.unsent
    world.core.from_detokenizer(delta(started[0], 0, [1]))
    world.core.closed(CLIENT)
    world.say({"type": "ping"})
    (pong,) = world.heard()
    assert isinstance(pong, Pong)
    assert pong.session == "0abcdef0-2"


def test_many_messages_are_handled_bit_by_bit() -> None:
    world = World()
    for _ in range(1000):
        world.core.receive(CLIENT, msgspec.msgpack.encode({"type": "ping"}))
    world.core.work()
    some = len(world.heard())
    assert 0 < some < 1000
    world.work()
    assert some + len(world.heard()) == 1000


@pytest.mark.parametrize("torn", [False, True])
def test_large_messages_are_handled_one_by_one(torn: bool) -> None:
    world = World()
    large = msgspec.msgpack.encode({"type": "ping", "id": "x" * 900_000})
    for _ in range(20):
        world.core.receive(CLIENT, large[:-1] if torn else large)
    world.core.receive(OTHER, msgspec.msgpack.encode({"type": "ping"}))
    world.core.work()
    some = len(world.heard())
    assert 0 < some <= 2
    world.core.work()
    assert len(world.heard(OTHER)) == 1
    some += len(world.heard())
    assert some <= 4
    world.work()
    assert some + len(world.heard()) == 20


def test_clients_take_turns() -> None:
    """One sends far more than the other. Neither waits for the other, and each is served in
    order."""
    world = World()
    orders = {CLIENT: [f"{n}" for n in range(1000)], OTHER: [f"{n}" for n in range(200)]}
    for client, ids in orders.items():
        for name in ids:
            world.core.receive(client, msgspec.msgpack.encode({"type": "ping", "id": name}))
    heard: dict[bytes, list[str | None]] = {CLIENT: [], OTHER: []}
    while world.core.has_work:
        world.core.work()
        for client in orders:
            heard[client] += [pong.id for pong in world.heard(client) if isinstance(pong, Pong)]
        done = len(heard[OTHER]) == len(orders[OTHER])
        assert done or abs(len(heard[OTHER]) - len(heard[CLIENT])) <= 1
    assert heard == orders


def test_client_queues_are_bounded() -> None:
    world = World()
    frame = bytes(16 << 20)
    for _ in range(MAX_QUEUED_BYTES // len(frame) - 1):
        world.core.receive(CLIENT, frame)
    world.core.receive(OTHER, msgspec.msgpack.encode({"type": "ping"}))
    assert world.core.flooded() is None
    world.core.receive(OTHER, frame)
    assert world.core.flooded() == CLIENT, "which sent most of it"
    assert world.core.flooded() is None
    world.work()
    pong, error = world.heard(OTHER)
    assert isinstance(pong, Pong)
    assert isinstance(error, Error)
    assert world.core.stats.sessions == 1


def test_the_bytes_of_requests_that_are_held_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "MAX_REQUEST_BYTES", 100_000)
    world = World()
    for name in "abc":
        world.generate(name, prompt="x" * 40_000)
    (error,) = world.heard()
    assert isinstance(error, Error)
    assert (error.id, error.code) == ("c", "overloaded")
    world.say({"type": "abort", "id": "a"})
    world.heard()
    world.generate("d", prompt="x" * 40_000)
    assert world.heard() == []


def pings(world: World, tokenize: Tokenize) -> None:
    world.say({"type": "ping", "id": "x" * 30_000})


def stream(world: World, tokenize: Tokenize) -> None:
    new = delta(tokenize, world.steps, [world.steps])
    new.text, new.text_offset = "x" * 30_000, world.steps * 30_000
    world.core.from_detokenizer(new)


def logprobs(world: World, tokenize: Tokenize) -> None:
    new = delta(tokenize, 100 * world.steps, list(range(100)))
    new.logprobs = [TokenLogprobs(bytes(84), bytes(84))] * 100
    new.text, new.text_offset = "", 0
    world.core.from_detokenizer(new)


def whole_answers(world: World, tokenize: Tokenize) -> None:
    (whole,) = world.start(f"whole {world.steps}", stream=False)
    end = delta(whole, 0, [1], end=True)
    end.text = "x" * 30_000
    world.core.from_detokenizer(end)


@pytest.mark.parametrize("produce", [pings, stream, logprobs, whole_answers])
def test_what_is_kept_for_a_client_that_does_not_read_is_bounded(
    produce: Callable[[World, Tokenize], None],
) -> None:
    world = World(max_pending_requests=1000)
    (tokenize,) = world.start("a", sampling={"logprobs": 20})
    world.start("b", client=OTHER)
    world.full.add(CLIENT)
    (session,) = (s for s in world.core.unsent if s.connection == CLIENT)
    for world.steps in range(2000):
        produce(world, tokenize)
        assert session.unread_bytes < 1.1 * MAX_UNREAD_BYTES
        assert world.sent() == []
        if world.disconnected:
            break
    assert world.disconnected == [CLIENT]
    assert session.unread_bytes > MAX_UNREAD_BYTES
    assert tokenize.uid in world.core.ends, "its request was aborted"
    assert world.core.stats.requests == 1, "others go on"


def test_what_was_read_is_not_counted() -> None:
    world = World()
    (tokenize,) = world.start("a")
    for world.steps in range(300):
        for produce in (pings, stream, whole_answers):
            produce(world, tokenize)
        (session,) = world.core.unsent
        world.heard()
        assert session.unread_bytes == 0


def test_a_client_whose_socket_takes_nothing_is_treated_as_gone() -> None:
    world = World()
    (tokenize,) = world.start("a")
    for world.now in (0.0, MAX_FULL_S - 0.1):
        world.full.add(CLIENT)
        assert world.sent() == []
    world.full.clear()
    assert world.heard(), "it reads again, before it is too late"
    world.full.add(CLIENT)
    for world.now in (10.0, 10.0 + MAX_FULL_S - 0.1):
        world.core.from_detokenizer(delta(tokenize, 0, [1]))
        world.sent()
        assert not world.disconnected
    world.now = 10.1 + MAX_FULL_S
    world.sent()
    assert world.disconnected == [CLIENT]
    assert world.core.ends == {tokenize.uid}
    assert world.core.stats == IngressStats(0, 0, 1)


def test_a_slow_reader_gets_everything_merged() -> None:
    world = World()
    (tokenize,) = world.start("a")
    world.full.add(CLIENT)
    world.sent()
    for offset in range(20):
        world.core.from_detokenizer(delta(tokenize, offset, [offset], end=offset == 19))
        world.sent()
    assert world.core.ends == set()
    world.generate("a")
    world.full.clear()
    frames = world.sent()
    assert len(frames) == 2, "the one that was refused, and one with all the rest"
    first, second = map(decode, frames)
    assert first == [Accepted(id="a", session=SESSION, seed=4242)]
    duplicate, merged, finish = second
    assert isinstance(duplicate, Error)
    assert duplicate.code == "duplicate_id"
    assert isinstance(merged, Delta)
    assert merged.token_ids == list(range(20))
    assert isinstance(finish, Finish)
    assert world.core.ends == {tokenize.uid}


def test_the_window_of_a_tokenizer_and_the_order_of_arrival() -> None:
    world = World(max_pending_requests=1000)
    world.core.service_up(SECOND)
    for number in range(3 * WINDOW):
        world.generate(str(number))
    first, second = world.tokenizes(), world.tokenizes(SECOND)
    assert len(first) == len(second) == WINDOW
    world.core.service_down(SECOND)
    world.core.from_tokenizer(HandedOn(first[0].uid, 1, 1, SCHEDULER.incarnation), now=0.0)
    world.core.from_tokenizer(Refused(first[1].uid, 1, "internal", "no"), now=0.0)
    again = world.tokenizes()
    assert [t.uid for t in again] == [second[0].uid, second[1].uid], "the earliest of the lost"
    assert [t.attempt for t in again] == [2, 2]


def test_a_tokenizer_that_goes_with_nothing_in_hand_is_no_reason_to_warn(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World()
    world.core.service_up(SECOND)
    world.generate("a")
    world.core.service_down(SECOND)
    assert not caplog.records
    world.core.service_down(TOKENIZER)
    assert "it had 1 request in hand" in caplog.text


def test_a_tokenizer_that_dies_loses_nothing() -> None:
    world = World()
    world.generate("tokenizing")
    world.generate("handed on")
    world.generate("admitted")
    tokenizing, handed_on, admitted = world.tokenizes()
    world.core.from_tokenizer(HandedOn(handed_on.uid, 1, 1, SCHEDULER.incarnation), now=0.0)
    world.core.from_tokenizer(HandedOn(admitted.uid, 1, 1, SCHEDULER.incarnation), now=0.0)
    world.core.from_scheduler(Admitted(admitted.uid, 1))
    world.core.service_down(TOKENIZER)
    world.core.service_up(SECOND)
    again = world.tokenizes(SECOND)
    assert [(t.uid, t.attempt) for t in again] == [(tokenizing.uid, 2), (handed_on.uid, 2)]
    # What the dead one said arrives late: nothing of it is believed.
    world.core.from_tokenizer(Refused(tokenizing.uid, 1, "internal", "old"), now=0.0)
    world.core.from_detokenizer(delta(handed_on, 0, [1]))
    assert not [m for m in world.heard() if isinstance(m, Error | Delta)]


def test_a_new_scheduler_gets_all_that_is_unfinished_with_its_output() -> None:
    world = World()
    running, done = world.start("a", "b", resume_token_ids=[5])
    world.core.from_detokenizer(delta(running, 1, [11, 12]))
    world.core.from_detokenizer(delta(done, 1, [13], end=True))
    world.core.scheduler_down(SCHEDULER)
    world.core.scheduler_up(SCHEDULER, reborn=True)
    (again,) = world.tokenizes()
    assert (again.uid, again.attempt, again.resumed) == (running.uid, 2, 1)
    assert unpack(again.output).tolist() == [5, 11, 12]
    world.core.from_detokenizer(delta(running, 3, [99]))
    world.core.from_detokenizer(delta(again, 1, [11, 12, 14], end=True))
    heard = world.heard()
    tokens = [t for m in heard if isinstance(m, Delta) and m.id == "a" for t in m.token_ids]
    assert tokens == [11, 12, 14]
    assert Counter(type(m) for m in heard)[Finish] == 2


def test_only_a_scheduler_that_comes_after_another_takes_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World(services=False)
    world.core.service_up(TOKENIZER)
    world.generate("a")
    world.generate("b")
    world.core.scheduler_up(SCHEDULER, reborn=True)
    assert not caplog.records
    world.core.scheduler_down(SCHEDULER)
    world.core.scheduler_up(Peer("scheduler", 0, 14), reborn=True)
    assert "takes over 2 requests" in caplog.text


def test_a_scheduler_that_was_away_gets_again_what_it_had_not_admitted() -> None:
    world = World()
    (known,) = world.start("a")
    world.generate("b")
    (lost,) = world.tokenizes()
    world.core.from_tokenizer(HandedOn(lost.uid, 1, 1, SCHEDULER.incarnation), now=0.0)
    world.core.scheduler_down(SCHEDULER)
    world.core.scheduler_up(SCHEDULER, reborn=False)
    assert [(t.uid, t.attempt) for t in world.tokenizes()] == [(lost.uid, 2)]
    world.core.from_scheduler(Admitted(known.uid, 1))
    world.core.from_scheduler(Admitted(lost.uid, 1))
    world.core.from_scheduler(Admitted(77, 1))
    assert world.core.ends == {77}


def test_what_was_handed_to_a_scheduler_that_is_gone_is_submitted_again_at_once() -> None:
    world = World()
    world.generate("a")
    world.core.scheduler_down(SCHEDULER)
    world.core.scheduler_up(Peer("scheduler", 0, 14), reborn=True)
    *_, tokenize = world.tokenizes()
    assert tokenize.attempt == 2
    world.core.from_tokenizer(HandedOn(tokenize.uid, 2, 1, SCHEDULER.incarnation), now=0.0)
    assert [t.attempt for t in world.tokenizes()] == [3]
    assert world.heard() == [Accepted(id="a", session=SESSION, seed=4242)]


def test_what_is_never_admitted_is_submitted_again() -> None:
    world = World()
    world.generate("a")
    (tokenize,) = world.tokenizes()
    world.core.from_tokenizer(HandedOn(tokenize.uid, 1, 1, SCHEDULER.incarnation), now=100.0)
    deadline = world.core.next_deadline
    assert deadline == 100.0 + ADMISSION_TIMEOUT_S
    world.core.submit_lost(math.nextafter(deadline, 0))
    assert world.tokenizes() == []
    world.core.submit_lost(deadline)
    assert [t.attempt for t in world.tokenizes()] == [2]


@settings(max_examples=300)
@given(st.data())
def test_exactly_once_whatever_dies(data: st.DataObject) -> None:
    """Random deltas of random attempts, deaths, and a client that reads now and then."""
    world = World()
    truth = data.draw(st.lists(st.integers(0, 999), min_size=1, max_size=10))
    resumed = data.draw(st.integers(0, len(truth) - 1))
    stream = data.draw(st.booleans())
    latest: Tokenize = world.start("a", stream=stream, resume_token_ids=truth[:resumed])[0]
    heard = world.heard()
    for _ in range(data.draw(st.integers(0, 15))):
        action = data.draw(st.sampled_from(["delta"] * 4 + ["scheduler", "tokenizer", "read"]))
        if action == "delta":
            start = data.draw(st.integers(resumed, len(truth)))
            end = data.draw(st.integers(start, len(truth) - 1)) if start < len(truth) else start
            attempt = data.draw(st.integers(1, latest.attempt + 1))
            world.core.from_detokenizer(delta(latest, start, truth[start:end], attempt=attempt))
        elif action == "scheduler":
            world.core.scheduler_down(SCHEDULER)
            world.core.scheduler_up(SCHEDULER, reborn=data.draw(st.booleans()))
        elif action == "tokenizer":
            world.core.service_down(TOKENIZER)
            world.core.service_up(TOKENIZER)
        else:
            heard += world.heard()
        for latest in world.tokenizes():
            known = unpack(latest.output).tolist()
            assert known == truth[: len(known)]
            if data.draw(st.booleans()):
                world.core.from_tokenizer(
                    HandedOn(latest.uid, latest.attempt, 1, SCHEDULER.incarnation), now=0.0
                )
    world.core.from_detokenizer(delta(latest, resumed, truth[resumed:], end=True))
    heard += world.heard()
    finish = heard.pop()
    assert isinstance(finish, Finish)
    if stream:
        assert isinstance(heard.pop(0), Accepted)
        offset, text = resumed, ""
        for message in heard:
            assert isinstance(message, Delta)
            assert message.offset == offset
            assert message.token_ids == truth[offset : offset + len(message.token_ids)]
            offset += len(message.token_ids)
            text += message.text
        assert offset == len(truth)
    else:
        assert heard == []
        assert finish.token_ids == truth[resumed:]
        assert isinstance(finish.text, str)
        text = finish.text
    assert text == "".join(str(token % 10) for token in truth[resumed:])
    assert world.core.stats.requests == 0
    assert latest.uid in world.core.ends
