"""Rank 0 takes the right plans and keeps the right results over restarts and reconnects."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.messages import StepResult
from nanovllm.services.gpu_worker.dialogue import Dialogue, DialoguePhase


def result(number: int) -> StepResult:
    return StepResult(number, b"", [], 0, 0)


def numbers(dialogue: Dialogue) -> list[int]:
    return [kept.number for kept in dialogue.unsent]


def phase(dialogue: Dialogue) -> DialoguePhase:
    return dialogue.phase


def serving(first: int = 0, depth: int = 2) -> Dialogue:
    dialogue = Dialogue(depth)
    assert dialogue.accepts_reset(first)
    return dialogue


def test_plans_are_taken_once_and_in_order() -> None:
    dialogue = Dialogue(2)
    assert not dialogue.accepts_plan(0), "before a reset"
    assert dialogue.accepts_reset(7)
    with pytest.raises(ValueError, match="plan 8 came, and not plan 7"):
        dialogue.accepts_plan(8)
    assert dialogue.accepts_plan(7)
    assert not dialogue.accepts_plan(7)
    assert dialogue.accepts_plan(8)


def test_a_copy_of_a_reset_does_not_empty_the_slots_again() -> None:
    dialogue = serving(5)
    assert dialogue.accepts_reset(5), "nothing was planned yet: as good as the first"
    assert dialogue.accepts_plan(5)
    assert not dialogue.accepts_reset(5)
    assert dialogue.accepts_reset(6)


def test_results_are_sent_again_over_a_new_connection() -> None:
    dialogue = serving()
    for number in (0, 1):
        assert dialogue.accepts_plan(number)
        dialogue.finished(result(number))
    assert numbers(dialogue) == [0, 1]
    dialogue.sent()
    assert numbers(dialogue) == []
    dialogue.reconnected()
    assert numbers(dialogue) == [0, 1]
    assert dialogue.accepts_plan(2), "which shows that result 0 has arrived"
    assert numbers(dialogue) == [1]


def test_a_new_scheduler_waits_for_the_device_to_drain() -> None:
    dialogue = serving()
    assert dialogue.accepts_plan(0)
    dialogue.finished(result(0))
    assert dialogue.accepts_plan(1)
    assert dialogue.accepts_plan(2)
    dialogue.reborn()
    assert phase(dialogue) is DialoguePhase.DRAINING
    assert numbers(dialogue) == []
    assert not dialogue.accepts_reset(0)
    dialogue.finished(result(1))
    assert phase(dialogue) is DialoguePhase.DRAINING
    dialogue.finished(result(2))
    assert phase(dialogue) is DialoguePhase.WAITING
    assert numbers(dialogue) == []
    assert dialogue.accepts_reset(0)
    assert dialogue.accepts_plan(0)


def test_a_new_scheduler_on_an_idle_device_need_not_wait() -> None:
    dialogue = serving()
    dialogue.reborn()
    assert dialogue.phase is DialoguePhase.WAITING


EVENTS = ("plan", "finish", "send", "send into the void", "reconnect")


@given(st.lists(st.sampled_from(EVENTS), max_size=100), st.integers(1, 4))
def test_every_result_arrives_over_a_link_that_loses(events: list[str], depth: int) -> None:
    """The scheduler sends plan n + depth when it has result n, and all that it still waits for
    whenever the link was made anew."""
    dialogue = serving(depth=depth)
    arrived: list[int] = []
    planned, finished = 0, 0
    for event in [*events, *["finish"] * depth, "reconnect", "send"]:
        if event == "plan" and planned < len(arrived) + depth:
            assert dialogue.accepts_plan(planned)
            planned += 1
        elif event == "finish" and finished < planned:
            dialogue.finished(result(finished))
            finished += 1
        elif event == "send":
            for number in numbers(dialogue):
                assert number <= len(arrived), "no gap"
                if number == len(arrived):
                    arrived.append(number)
            dialogue.sent()
        elif event == "send into the void":
            dialogue.sent()
            dialogue.reconnected()
        elif event == "reconnect":
            dialogue.reconnected()
            for number in range(len(arrived), planned):
                assert not dialogue.accepts_plan(number), "it has them"
        assert len(dialogue.unsent) <= depth
    assert arrived == list(range(planned))
