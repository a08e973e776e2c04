"""How requests are given to tokenizers, and given again when a tokenizer dies."""

from __future__ import annotations

import pytest

from nanovllm.messages import Refused, Tokenize
from nanovllm.protocol import Accepted, Finish
from nanovllm.services.ingress.tokenizers import WINDOW
from nanovllm.transport.links import FRAME_BYTES, Peer
from tests.ingress.harness import CLIENT, OTHER, SCHEDULER, TOKENIZER, World

SECOND = Peer("tokenizer", 1, 21)


def uids(tokenizes: list[Tokenize]) -> list[int]:
    return [tokenize.uid for tokenize in tokenizes]


def test_the_window_of_a_tokenizer_and_the_order_of_arrival() -> None:
    world = World(max_pending_requests=1000)
    world.core.service_up(SECOND)
    for number in range(3 * WINDOW):
        world.generate(str(number))
    first, second = world.tokenizes(), world.tokenizes(SECOND)
    assert len(first) == len(second) == WINDOW
    world.core.service_down(SECOND)
    world.tokenized(first[0])
    world.core.from_tokenizer(TOKENIZER, Refused(first[1].uid, "internal", "no"))
    assert uids(world.tokenizes()) == uids(second[:2]), "the earliest of the lost"


def test_a_request_that_is_over_counts_until_it_is_answered_if_it_was_sent() -> None:
    world = World(max_pending_requests=1000)
    for number in range(2 * WINDOW):
        world.generate(str(number))
    world.abort("0")
    sent = world.tokenizes()
    assert len(sent) == WINDOW, "another is there in its place: it had not been sent"
    world.abort("1")
    assert world.tokenizes() == [], "the tokenizer works on it"
    world.tokenized(sent[0])
    assert len(world.tokenizes()) == 1


@pytest.mark.parametrize("sent", [0, WINDOW])
def test_a_client_that_leaves_with_thousands_of_requests_leaves_none_to_be_sent(sent: int) -> None:
    """Whether or not the tokenizer has been sent those that it is to have in hand."""
    world = World(max_pending_requests=10_000)
    for number in range(4000):
        world.generate(str(number), prompt="x" * 4000)
    in_hand = world.tokenizes() if sent else []
    assert len(in_hand) == sent
    world.generate("other", OTHER)
    world.core.closed(CLIENT)
    assert world.core.stats.requests == 1
    frames = dict(world.core.tokenizers.frames())
    assert sum(map(len, frames.values())) == (0 if sent else 1), "nothing of the one that left"
    world.tokenized(*in_hand)
    (other,) = world.tokenizes()
    assert other.prompt == "x"


def test_a_frame_holds_so_many_bytes_or_one_request() -> None:
    world = World()
    for number, size in enumerate([*[FRAME_BYTES * 2 // 5] * 3, FRAME_BYTES - 400, 1]):
        world.generate(str(number), prompt="x" * size)
    requests_in_frames = []
    while frames := dict(world.core.tokenizers.frames()):
        requests_in_frames.append(len(frames[TOKENIZER]))
        world.core.tokenizers.sent(TOKENIZER, frames[TOKENIZER])
    assert requests_in_frames == [2, 1, 1, 1]


def test_the_first_answer_counts_whoever_sends_it() -> None:
    """A tokenizer that was away answers what another was given meanwhile, be it sent or not."""
    world = World()
    world.core.service_up(SECOND)
    for name in "abcd":
        world.generate(name)
    first, second = world.tokenizes(), world.tokenizes(SECOND)
    world.core.service_down(TOKENIZER)
    world.core.service_up(TOKENIZER)
    world.tokenized(*first)
    again = world.tokenizes() + world.tokenizes(SECOND)
    assert again == [], "nobody needs to do it again"
    world.tokenized(*second, *first, peer=SECOND)
    world.core.from_tokenizer(SECOND, Refused(first[0].uid, "internal", "late"))
    assert sorted(submit.uid for submit in world.submits()) == sorted(uids(first + second))
    heard = world.heard()
    assert sorted(message.id for message in heard if isinstance(message, Accepted)) == [*"abcd"]
    assert len(heard) == 4


def test_a_tokenizer_that_dies_loses_nothing() -> None:
    world = World()
    world.core.service_down(SCHEDULER)
    for name in ("tokenized", "tokenizing", "aborted"):
        world.generate(name)
    tokenized, tokenizing, _ = world.tokenizes()
    world.tokenized(tokenized)
    assert [type(message) for message in world.heard()] == [Accepted], "though no engine is there"
    world.abort("aborted")
    assert [type(message) for message in world.heard()] == [Finish]
    world.core.service_down(TOKENIZER)
    world.core.service_up(SECOND)
    assert world.tokenizes(SECOND) == [tokenizing]
    world.tokenized(tokenizing, peer=SECOND)
    world.scheduler_up(SCHEDULER)
    assert [submit.uid for submit in world.submits()] == uids([tokenized, tokenizing])


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
