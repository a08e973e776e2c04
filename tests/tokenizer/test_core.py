"""What a tokenizer has in hand, and when it lets go of it."""

from __future__ import annotations

import pytest

from nanovllm.messages import Cancel, HandedOn, Refused, pack
from nanovllm.services.tokenizer.core import SUBMITS_A_FRAME, Desk
from nanovllm.services.tokenizer.prompts import PromptEncoder
from tests.bpe import write_checkpoint_files
from tests.tokenizer.test_prompts import request

EPOCH = 7
UID = EPOCH << 32


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    directory = write_checkpoint_files(tmp_path_factory.mktemp("model"))
    return PromptEncoder.from_checkpoint(directory, 64)


@pytest.fixture
def desk(encoder: PromptEncoder) -> Desk:
    return Desk(encoder.encode)


def take(desk: Desk, number: int, attempt: int = 1, prompt: tuple[int, ...] = (5,)) -> None:
    desk.take(request(uid=UID + number, attempt=attempt, token_ids=pack(prompt)))


def work_all(desk: Desk) -> None:
    while not desk.idle:
        desk.work()


def in_hand(desk: Desk) -> list[tuple[int, int]]:
    return [(submit.uid - UID, submit.attempt) for submit in desk.submits()]


def test_a_request_is_handed_on_when_the_scheduler_was_sent_it(desk: Desk) -> None:
    take(desk, 1)
    take(desk, 2, prompt=())
    take(desk, 3)
    work_all(desk)
    (refusal,) = desk.replies()
    assert isinstance(refusal, Refused)
    assert refusal.uid == UID + 2
    desk.replied()
    assert in_hand(desk) == [(1, 1), (3, 1)]
    assert desk.replies() == []
    prompt_tokens = len(desk.submits()[0].prompt) // 4
    desk.submitted(desk.submits(), 7)
    assert desk.replies() == [
        HandedOn(UID + 1, 1, prompt_tokens, 7),
        HandedOn(UID + 3, 1, prompt_tokens, 7),
    ]
    assert desk.submits() == []
    stats = desk.stats()
    assert (stats.queued, stats.tokenized) == (0, 2)


def test_a_newer_attempt_replaces_an_older_one_wherever_it_is(desk: Desk) -> None:
    take(desk, 1, attempt=2)
    take(desk, 1, attempt=1)
    take(desk, 1, attempt=2)
    work_all(desk)
    assert in_hand(desk) == [(1, 2)]
    take(desk, 1, attempt=1)
    take(desk, 1, attempt=2)
    assert desk.idle
    take(desk, 1, attempt=3)
    assert in_hand(desk) == []
    work_all(desk)
    assert in_hand(desk) == [(1, 3)]


def test_cancelled_requests_go_nowhere(desk: Desk) -> None:
    take(desk, 1)
    desk.take(Cancel(UID + 1))
    desk.take(Cancel(UID + 9))
    assert desk.idle
    take(desk, 2)
    work_all(desk)
    desk.take(Cancel(UID + 2))
    assert in_hand(desk) == []
    assert desk.replies() == []


def test_the_requests_of_another_life_of_the_ingress_are_dropped(desk: Desk) -> None:
    take(desk, 1)
    take(desk, 2, prompt=())
    work_all(desk)
    take(desk, 3)
    desk.ingress_up(EPOCH)
    assert len(desk.replies()) == len(desk.submits()) == desk.stats().queued - 1 == 1
    desk.ingress_up(EPOCH + 1)
    assert desk.idle
    assert desk.replies() == []
    assert desk.submits() == []


def test_many_requests_take_several_frames(desk: Desk) -> None:
    for number in range(SUBMITS_A_FRAME + 1):
        take(desk, number)
    work_all(desk)
    desk.submitted(desk.submits(), 7)
    assert in_hand(desk) == [(SUBMITS_A_FRAME, 1)]
