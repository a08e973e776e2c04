"""The core in memory: requests from their clients' messages to their ends."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.messages import Refused, Submit, Tokenize, unpack
from nanovllm.protocol import Accepted, Delta, Error, Finish, Pong, Usage
from nanovllm.services.ingress.frames import FRAMING
from nanovllm.transport.links import Peer
from tests.ingress.harness import (
    CLIENT,
    DETOKENIZER,
    INCARNATION,
    NOT_READY,
    OTHER,
    PROMPT,
    READY,
    SCHEDULER,
    SESSION,
    TOKENIZER,
    World,
    decoded,
    missing,
)


def test_a_stream_from_request_to_finish() -> None:
    world = World()
    world.generate("a", sampling={"max_tokens": 10**18, "stop_token_ids": [5, 3]}, cache_salt="s")
    (tokenize,) = world.tokenizes()
    assert tokenize.uid == INCARNATION << 32 | 1
    assert (tokenize.prompt, tokenize.prompt_token_ids, tokenize.chat) == ("x", None, None)
    assert (tokenize.sampling.seed, tokenize.sampling.max_tokens) == (4242, 10**18)
    assert world.heard() == [], "not accepted before the tokenizer has answered"
    tokenize.sampling.max_tokens = 61
    world.tokenized(tokenize)
    assert world.heard() == [Accepted(id="a", session=SESSION, seed=4242)]
    (submit,) = world.submits()
    assert (submit.uid, submit.attempt, submit.cache_salt) == (tokenize.uid, 1, "s")
    assert unpack(submit.prompt).tolist() == PROMPT
    assert submit.sampling == tokenize.sampling, "as the tokenizer has answered"
    world.core.from_detokenizer(decoded(submit, 0, [11]))
    world.core.from_detokenizer(decoded(submit, 1, [12, 13]))
    assert world.heard() == [Delta(id="a", offset=0, token_ids=[11, 12, 13], text="123")]
    world.core.from_detokenizer(decoded(submit, 3, [14], end=True))
    assert world.core.stats.requests == 1, "the finish is not delivered yet"
    assert world.heard() == [
        Delta(id="a", offset=3, token_ids=[14], text="4"),
        Finish(id="a", finish_reason="length", usage=Usage(3, 4, 2)),
    ]
    world.engine_frames()
    assert world.ended == [(submit.uid, 1)]
    assert (world.core.stats.requests, world.core.stats.finished) == (0, 1)
    world.generate("a")
    assert len(world.tokenizes()) == 1, "the id is free again"


def test_finish_without_stream_carries_everything() -> None:
    world = World()
    (submit,) = world.start("a", stream=False, resume_token_ids=[8, 9], sampling={"seed": 1})
    assert unpack(submit.output).tolist() == [8, 9]
    assert submit.resumed == 2
    world.core.from_detokenizer(decoded(submit, 2, [11]))
    assert world.heard() == []
    world.core.from_detokenizer(decoded(submit, 3, [12], end=True))
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
    world.core.from_tokenizer(TOKENIZER, Refused(tokenize.uid, "invalid_request", "no template"))
    assert world.heard() == [Error(id="a", code="invalid_request", message="no template")]
    assert world.submits() == []
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
    world = World(max_pending_requests=3)
    (first,) = world.start("a")
    world.generate("b", client=OTHER)
    world.tokenizes()
    world.heard()
    world.generate("c")
    (error,) = world.heard()
    assert isinstance(error, Error)
    assert (error.id, error.code) == ("c", "overloaded")
    world.core.from_detokenizer(decoded(first, 0, [1], end=True))
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
    assert (error.id, error.code) == ("new", "shutting_down")
    world.tokenized(*world.tokenizes())
    (submit,) = world.submits()
    assert unpack(submit.output).tolist() == [7, 8]
    assert not world.core.drained


STAGES = ["no tokenizer", "unsent", "tokenizing", "no engine", "submitted", "running"]


@pytest.mark.parametrize("reached", range(len(STAGES)), ids=STAGES)
def test_abort_at_every_stage(reached: int) -> None:
    """The client hears how many tokens there were, no service gets more messages, and output on its
    way is dropped."""
    world = World(services=False)
    world.generate("a", prompt=None, prompt_token_ids=PROMPT, resume_token_ids=[7])
    tokenizes: list[Tokenize] = []
    submits: list[Submit] = []
    if reached >= 1:
        world.core.service_up(TOKENIZER)
    if reached >= 2:
        tokenizes = world.tokenizes()
    if reached >= 3:
        world.tokenized(*tokenizes)
    if reached >= 4:
        world.scheduler_up(SCHEDULER)
        submits = world.submits()
    if reached >= 5:
        world.core.from_detokenizer(decoded(submits[0], 1, [21]))
    world.heard()
    world.abort("nobody")
    world.abort("a")
    completion = 2 if reached == 5 else 1
    assert world.heard() == [Finish(id="a", finish_reason="abort", usage=Usage(3, completion, 0))]
    assert world.core.stats.requests == 0
    world.core.service_up(TOKENIZER)
    world.scheduler_up(SCHEDULER)
    assert world.tokenizes() == []
    world.tokenized(*tokenizes)
    for submit in submits:
        world.core.from_detokenizer(decoded(submit, completion, [22]))
    assert world.submits() == []
    assert world.held == {}
    assert world.heard() == []


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

    world.core.from_scheduler(SCHEDULER, NOT_READY)
    assert not ready()
    world.core.from_scheduler(SCHEDULER, READY)
    world.core.service_down(SCHEDULER)
    assert not ready()
    world.scheduler_up(SCHEDULER, None)
    assert not ready(), "the engine's state is not known yet"
    world.core.from_scheduler(Peer("scheduler", 1, 99), READY)
    assert not ready(), "that is another scheduler's"
    world.core.from_scheduler(SCHEDULER, READY)
    assert ready()
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
    queued = world.tokenizes()
    world.core.closed(CLIENT)
    world.tokenized(*queued)
    assert world.submits() == []
    assert world.ended == [(submit.uid, 1) for submit in started]
    stats = world.core.stats
    assert (stats.sessions, stats.requests) == (0, 0)
    assert not world.core.sessions.unsent
    world.core.from_detokenizer(decoded(started[0], 0, [1]))
    world.core.closed(CLIENT)
    world.say({"type": "ping"})
    (pong,) = world.heard()
    assert isinstance(pong, Pong)
    assert pong.session == "0abcdef0-2"


@settings(max_examples=300)
@given(st.data())
def test_exactly_once_whatever_dies(data: st.DataObject) -> None:
    """Random output of random attempts, deaths, and a client that reads now and then."""
    world = World()
    truth = data.draw(st.lists(st.integers(0, 999), min_size=1, max_size=10))
    resumed = data.draw(st.integers(0, len(truth) - 1))
    stream = data.draw(st.booleans())
    world.generate("a", stream=stream, resume_token_ids=truth[:resumed])
    heard = world.heard()
    latest: Submit | None = None
    incarnation = SCHEDULER.incarnation
    actions = ["decoded"] * 4 + ["tokenizer", "tokenized", "scheduler", "missing", "state", "read"]
    for action in data.draw(st.lists(st.sampled_from(actions), max_size=20)):
        if action == "decoded" and latest is not None:
            start = data.draw(st.integers(resumed, len(truth)))
            end = data.draw(st.integers(start, len(truth) - 1)) if start < len(truth) else start
            attempt = data.draw(st.integers(1, latest.attempt + 1))
            world.core.from_detokenizer(decoded(latest, start, truth[start:end], attempt=attempt))
        elif action == "tokenizer":
            world.core.service_down(TOKENIZER)
            world.core.service_up(TOKENIZER)
        elif action == "tokenized":
            world.tokenized(*world.tokenizes())
        elif action == "scheduler":
            incarnation += data.draw(st.integers(0, 1))
            world.scheduler_restarts(Peer("scheduler", 0, incarnation))
        elif action == "missing" and latest is not None:
            attempt = data.draw(st.integers(1, latest.attempt))
            (peer,) = filter(None, [world.engine.peer])
            world.core.from_scheduler(peer, missing({latest.uid: attempt}))
        elif action == "state":
            state = data.draw(st.sampled_from([READY, NOT_READY]))
            world.core.from_scheduler(Peer("scheduler", 0, incarnation), state)
        elif action == "read":
            heard += world.heard()
        for submit in world.submits():
            assert submit.attempt == (latest.attempt + 1 if latest else 1)
            known = unpack(submit.output).tolist()
            assert known == truth[: len(known)]
            latest = submit
    world.core.from_scheduler(Peer("scheduler", 0, incarnation), READY)
    world.tokenized(*world.tokenizes())
    latest = next(iter(world.submits()), latest)
    assert latest is not None
    world.core.from_detokenizer(decoded(latest, resumed, truth[resumed:], end=True))
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
    world.engine_frames()
    assert world.ended[-1] == (latest.uid, latest.attempt)
