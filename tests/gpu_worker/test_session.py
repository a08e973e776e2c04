"""Which plans rank 0 takes and which results it keeps, whatever the scheduler and the link do."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nanovllm.messages import StepResult
from nanovllm.services.gpu_worker.session import Phase, Session


def result(number: int) -> StepResult:
    return StepResult(number, b"", [], 0, 0)


def numbers(session: Session) -> list[int]:
    return [kept.number for kept in session.unsent]


def phase(session: Session) -> Phase:
    return session.phase


def serving(first: int = 0, depth: int = 2) -> Session:
    session = Session(depth)
    assert session.accepts_reset(first)
    return session


def test_plans_are_taken_once_and_in_order() -> None:
    session = Session(2)
    assert not session.accepts_plan(0), "before a reset"
    assert session.accepts_reset(7)
    assert not session.accepts_plan(8)
    assert session.accepts_plan(7)
    assert not session.accepts_plan(7)
    assert session.accepts_plan(8)


def test_a_copy_of_a_reset_does_not_empty_the_slots_again() -> None:
    session = serving(5)
    assert session.accepts_reset(5), "nothing was planned yet: as good as the first"
    assert session.accepts_plan(5)
    assert not session.accepts_reset(5)
    assert session.accepts_reset(6)


def test_results_are_sent_again_over_a_new_connection() -> None:
    session = serving()
    for number in (0, 1):
        assert session.accepts_plan(number)
        session.finished(result(number))
    assert numbers(session) == [0, 1]
    session.sent()
    assert numbers(session) == []
    session.reconnected()
    assert numbers(session) == [0, 1]
    assert session.accepts_plan(2), "which shows that result 0 has arrived"
    assert numbers(session) == [1]


def test_a_new_scheduler_waits_for_the_device_to_drain() -> None:
    session = serving()
    assert session.accepts_plan(0)
    session.finished(result(0))
    assert session.accepts_plan(1)
    assert session.accepts_plan(2)
    session.reborn()
    assert phase(session) is Phase.DRAINING
    assert numbers(session) == []
    assert not session.accepts_reset(0)
    session.finished(result(1))
    assert phase(session) is Phase.DRAINING
    session.finished(result(2))
    assert phase(session) is Phase.WAITING
    assert numbers(session) == []
    assert session.accepts_reset(0)
    assert session.accepts_plan(0)


def test_a_new_scheduler_on_an_idle_device_need_not_wait() -> None:
    session = serving()
    session.reborn()
    assert session.phase is Phase.WAITING


EVENTS = ("plan", "finish", "send", "send into the void", "reconnect")


@given(st.lists(st.sampled_from(EVENTS), max_size=100), st.integers(1, 4))
def test_every_result_arrives_over_a_link_that_loses(events: list[str], depth: int) -> None:
    """The scheduler sends plan n + depth when it has result n, and all that it still waits for
    whenever the link was made anew."""
    session = serving(depth=depth)
    arrived: list[int] = []
    planned, finished = 0, 0
    for event in [*events, *["finish"] * depth, "reconnect", "send"]:
        if event == "plan" and planned < len(arrived) + depth:
            assert session.accepts_plan(planned)
            planned += 1
        elif event == "finish" and finished < planned:
            session.finished(result(finished))
            finished += 1
        elif event == "send":
            for number in numbers(session):
                assert number <= len(arrived), "no gap"
                if number == len(arrived):
                    arrived.append(number)
            session.sent()
        elif event == "send into the void":
            session.sent()
            session.reconnected()
        elif event == "reconnect":
            session.reconnected()
            for number in range(len(arrived), planned):
                assert not session.accepts_plan(number), "it has them"
        assert len(session.unsent) <= depth
    assert arrived == list(range(planned))
