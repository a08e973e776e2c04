"""The requests that the scheduler is given, their order, and the messages around an `Up`."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.messages import (
    End,
    Held,
    Submit,
    Tokenized,
    pack,
    pack_int64,
    unpack,
    unpack_int64,
)
from nanovllm.protocol import Accepted, Generate
from nanovllm.services.ingress.engine import WAITING_BUDGETS, WAITING_REQUESTS, Engine
from nanovllm.services.ingress.pending import PendingRequests
from nanovllm.services.ingress.sessions import Session
from nanovllm.transport.links import FRAME_BYTES, Peer
from tests.ingress.harness import (
    BUDGET,
    DETOKENIZER,
    INCARNATION,
    NOT_READY,
    PROMPT,
    READY,
    REBORN,
    SCHEDULER,
    TOKENIZER,
    World,
    decoded,
    missing,
)


def names(submits: list[Submit]) -> list[tuple[int, int]]:
    return [(submit.uid, submit.attempt) for submit in submits]


# How much -----------------------------------------------------------------------------------------


@given(st.data())
def test_the_engine_is_given_what_fills_its_slots_and_a_little_more(data: st.DataObject) -> None:
    """As many as there are slots, and then 32 requests or two budgets in prompt tokens: no fewer
    while there are any, and no more."""
    world = World(max_pending_requests=1000)
    slots = data.draw(st.integers(1, 5))
    state = msgspec.structs.replace(READY, slots=slots)
    world.core.from_scheduler(SCHEDULER, state)
    given_: dict[int, Submit] = {}
    for number in range(data.draw(st.integers(0, 5))):
        length = data.draw(st.integers(1, 3))
        for further in range(data.draw(st.integers(0, 60))):
            world.generate(f"{number} {further}", prompt=None, prompt_token_ids=[7] * length)
        while tokenizes := world.tokenizes():
            world.tokenized(*tokenizes)
        given_ |= {submit.uid: submit for submit in world.submits()}
        some = st.lists(st.sampled_from(sorted(given_) or [0]), unique=True, max_size=len(given_))
        for uid in data.draw(some):
            world.core.from_detokenizer(decoded(given_.pop(uid), 0, [1], end=True))
            world.heard()
        if data.draw(st.booleans()):
            given_.clear()
            incarnation = SCHEDULER.incarnation + 1 + number
            world.scheduler_restarts(Peer("scheduler", 0, incarnation), state)
        given_ |= {submit.uid: submit for submit in world.submits()}
        waiting = list(given_.values())[slots:]
        tokens = sum(len(submit.prompt) // 4 for submit in waiting)
        held_back = world.core.stats.requests - len(given_)
        assert len(waiting) <= WAITING_REQUESTS or tokens <= WAITING_BUDGETS * BUDGET
        if held_back:
            assert len(waiting) >= WAITING_REQUESTS
            assert tokens + 3 > WAITING_BUDGETS * BUDGET


def test_a_frame_holds_so_many_bytes_or_one_request() -> None:
    world = World()
    for number, tokens in enumerate([*[FRAME_BYTES // 10] * 3, FRAME_BYTES // 2, 1]):
        world.generate(str(number))
        (tokenize,) = world.tokenizes()
        answer = msgspec.structs.replace(tokenize, prompt_token_ids=pack([7] * tokens))
        world.tokenized(answer)
    world.core.from_scheduler(SCHEDULER, msgspec.structs.replace(READY, slots=10))
    frames = world.engine_frames()
    assert [len([m for m in frame if isinstance(m, Submit)]) for frame in frames] == [2, 1, 1, 1]


def test_nothing_is_given_while_the_engine_is_not_ready() -> None:
    world = World()
    (running,) = world.start("a")
    world.core.from_scheduler(SCHEDULER, NOT_READY)
    assert world.start("b") == []
    assert [type(message) for message in world.heard()] == [Accepted, Accepted]
    world.core.service_down(SCHEDULER)
    world.scheduler_up(SCHEDULER, None)
    assert world.submits() == []
    assert world.held == {running.uid: 1}, "it goes on once its workers are back"
    world.core.from_scheduler(SCHEDULER, READY)
    assert names(world.submits()) == [(running.uid + 1, 1)]


# In which order, and what comes again -------------------------------------------------------------


def test_a_new_scheduler_is_given_all_that_ran_first_and_the_oldest_first() -> None:
    world = World()
    submits = world.start(*"abcde", resume_token_ids=[5], sampling={"max_tokens": 60})
    first, second, third, fourth, done = submits
    world.start("new")
    for running in (fourth, second):
        world.core.from_detokenizer(decoded(running, 1, [11, 12]))
    world.core.from_detokenizer(decoded(done, 1, [13], end=True))
    world.scheduler_restarts()
    ((held, *again),) = world.engine_frames()
    assert held == Held(b"", b""), "it comes before all else"
    assert [message.uid for message in again if isinstance(message, Submit)] == [
        *(submit.uid for submit in (second, fourth, first, third)),
        done.uid + 1,
    ]
    assert world.ended == [], "the new one knows nothing of it"
    for message in again:
        assert isinstance(message, Submit)
        assert message.attempt == 2
        assert message.prompt == first.prompt
        if message.uid == second.uid:
            assert unpack(message.output).tolist() == [5, 11, 12]
            assert message.resumed == 1


def test_requests_with_output_are_submitted_before_requests_without() -> None:
    world = World()
    world.core.from_scheduler(SCHEDULER, NOT_READY)
    world.start("early")
    world.core.from_scheduler(SCHEDULER, READY)
    early, late = world.submits() + world.start("late")
    world.core.from_detokenizer(decoded(late, 0, [11]))
    world.scheduler_restarts()
    submits = world.submits()
    assert names(submits) == [(late.uid, 2), (early.uid, 2)]
    world.core.from_detokenizer(decoded(submits[1], 0, [11]))
    world.scheduler_restarts(Peer("scheduler", 0, REBORN.incarnation + 1))
    assert names(world.submits()) == [(early.uid, 3), (late.uid, 3)]


def test_only_a_scheduler_that_comes_after_another_takes_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World()
    world.start("a", "b")
    assert not caplog.records
    world.core.service_down(SCHEDULER)
    world.core.service_up(REBORN)
    assert "takes over 2 requests" in caplog.text


def test_missing_submits_again_what_it_names_in_that_attempt() -> None:
    """After a link was made anew to the same scheduler."""
    world = World()
    lost, kept, taken_up, over = world.start("a", "b", "c", "d")
    world.core.from_detokenizer(decoded(lost, 0, [11]))
    world.core.from_scheduler(SCHEDULER, missing({taken_up.uid: 1}))
    assert names(world.submits()) == [(taken_up.uid, 2)]
    world.abort("d")
    world.core.service_down(SCHEDULER)
    world.scheduler_up(SCHEDULER)
    assert world.submits() == [], "it may have all of them"
    assert world.held == {lost.uid: 1, kept.uid: 1, taken_up.uid: 2}
    assert world.ended == [], "what `Held` does not name is ended by it"
    world.core.from_scheduler(REBORN, missing({kept.uid: 1}))
    world.core.from_scheduler(
        SCHEDULER, missing({taken_up.uid: 1, over.uid: 1, 77: 1, lost.uid: 1})
    )
    (again,) = world.submits()
    assert (again.uid, again.attempt) == (lost.uid, 2)
    assert unpack(again.output).tolist() == [11]


@pytest.mark.parametrize("incarnation", [INCARNATION, 2**31 - 1], ids=["some", "the highest"])
def test_the_number_of_requests_has_no_end(incarnation: int) -> None:
    """After 2**32 requests of one ingress the next are known apart, and served as ever, also when
    the scheduler's link is made anew."""
    sessions = [Session(bytes([n]), str(n)) for n in range(3)]
    pending = PendingRequests(incarnation, 100, draw_seed=lambda: 1)
    ask = Generate(id="a", prompt="x")
    first = pending.begin(sessions[0], ask, 1)
    pending.last_uid += 2**32 - 2
    last, beyond = (pending.begin(session, ask, 1) for session in sessions[1:])
    assert len({first.uid, last.uid, beyond.uid}) == 3
    uids = pack_int64(request.uid for request in (first, last, beyond))
    assert unpack_int64(uids) == [first.uid, last.uid, beyond.uid]
    engine = Engine(0, BUDGET)
    engine.up(SCHEDULER)
    engine.state(READY)
    for request in (first, last, beyond):
        answer = Tokenized(request.uid, pack(PROMPT), request.sampling)
        pending.tokenized(request, answer)
        engine.give(request)
    engine.sent(engine.frame())
    engine.down()
    assert engine.up(SCHEDULER) == []
    (held,) = engine.frame()
    assert isinstance(held, Held)
    assert held.uids == uids
    assert engine.missing(missing(dict.fromkeys(unpack_int64(uids), 1))) == 3


# Ends ---------------------------------------------------------------------------------------------


def test_an_end_cancels_what_was_not_sent_and_is_sent_if_an_earlier_attempt_was() -> None:
    world = World()
    world.engine_frames()
    unsent_at_first = _given_but_not_sent(world, "a")
    world.abort("a")
    assert world.engine_frames() == []
    # The scheduler has neither of two that it missed.
    missed, again = world.start("b", "c")
    world.core.from_scheduler(SCHEDULER, missing({missed.uid: 1, again.uid: 1}))
    world.abort("b")
    assert [names([m]) for f in world.engine_frames() for m in f if isinstance(m, Submit)] == [
        [(again.uid, 2)]
    ]
    world.abort("c")
    assert [m for f in world.engine_frames() for m in f] == [End(again.uid, 2)]
    # The scheduler was to be given it anew, and has it.
    (sent,) = world.start("d")
    request = world.engine.given[sent.uid]
    world.engine.end(request)
    world.engine.give(request)
    world.abort("d")
    assert [m for f in world.engine_frames() for m in f] == [End(sent.uid, 1)]
    assert unsent_at_first not in dict(world.ended)


def _given_but_not_sent(world: World, request_id: str) -> int:
    world.generate(request_id)
    (tokenize,) = world.tokenizes()
    world.tokenized(tokenize)
    world.core.submit()
    assert tokenize.uid in world.engine.given
    return tokenize.uid


def test_ends_go_before_what_is_submitted() -> None:
    world = World()
    (first,) = world.start("a")
    request = world.engine.given[first.uid]
    world.engine.end(request)
    world.engine.give(request)
    ((end, submit),) = world.engine_frames()
    assert end == End(first.uid, 1)
    assert isinstance(submit, Submit)
    assert submit.attempt == 2


def test_an_unsent_submit_is_not_held_after_a_reconnect_and_is_sent() -> None:
    world = World()
    (sent,) = world.start("a")
    unsent = _given_but_not_sent(world, "b")
    world.core.service_down(SCHEDULER)
    world.scheduler_up(SCHEDULER)
    assert names(world.submits()) == [(unsent, 1)]
    assert world.held == {sent.uid: 1}
    unsent = _given_but_not_sent(world, "c")
    world.scheduler_restarts(REBORN, NOT_READY)
    assert world.submits() == [], "and not at all if it is another scheduler, until that is ready"
    world.core.from_scheduler(REBORN, READY)
    assert names(world.submits()) == [(sent.uid, 2), (sent.uid + 1, 2), (unsent, 2)]
    world.core.service_down(REBORN)
    world.scheduler_up(REBORN)
    world.abort("a")
    ((held, end),) = world.engine_frames()
    assert isinstance(held, Held), "it names what has ended since, and comes first"
    assert end == End(sent.uid, 2)


def test_output_of_nobody_or_of_another_attempt_is_dropped_and_answered_by_nothing() -> None:
    world = World()
    (first,) = world.start("a")
    world.scheduler_restarts()
    (second,) = world.submits()
    world.heard()
    for attempt in (0, 1, 3):
        world.core.from_detokenizer(decoded(second, 0, [9], end=True, attempt=attempt))
    world.core.from_detokenizer(decoded(Submit(77, 1, b"", b"", 0, first.sampling, ""), 0, [9]))
    assert world.heard() == []
    assert world.engine_frames() == []
    assert world.core.stats.requests == 1


def test_the_services_may_come_in_any_order() -> None:
    world = World(services=False)
    world.generate("a")
    world.scheduler_up(SCHEDULER)
    assert world.submits() == []
    world.core.service_up(TOKENIZER)
    world.tokenized(*world.tokenizes())
    (submit,) = world.submits()
    world.core.service_up(DETOKENIZER)
    assert unpack(submit.prompt).tolist() == PROMPT
    assert world.held == {}
