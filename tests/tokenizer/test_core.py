"""What a tokenizer has in hand: in order, in frames of a bounded size, and of one connection."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from nanovllm.messages import Refused, Tokenize, Tokenized, TokenizerToIngress, pack, unpack
from nanovllm.protocol import Sampling
from nanovllm.services.tokenizer.core import TokenizeQueue
from nanovllm.transport.links import FRAME_BYTES, MESSAGE_BYTES
from tests.tokenizer.test_prompts import request


def encode(request: Tokenize) -> Tokenized | Refused:
    """As many zeros as the request's prompt token says; for none, a refusal."""
    (count,) = unpack(request.prompt_token_ids or pack([0])).tolist()
    if not count:
        return Refused(request.uid, "invalid_request", "x" * 2000)
    return Tokenized(request.uid, bytes(4 * count), Sampling())


def no_grammars(request: Tokenize, answer: Tokenized) -> None:
    raise AssertionError("none of these requests has a grammar")


def size(frame: list[TokenizerToIngress]) -> int:
    fields = (a.prompt if isinstance(a, Tokenized) else a.message for a in frame)
    return sum(MESSAGE_BYTES + len(longest) for longest in fields)


def send_all(queue: TokenizeQueue) -> list[TokenizerToIngress]:
    """Takes all answers, as full frames."""
    sent: list[TokenizerToIngress] = []
    while frame := queue.frame():
        assert len(frame) == 1 or size(frame) <= FRAME_BYTES
        assert queue.frame() == frame, "nothing is gone before it was sent"
        queue.sent(frame)
        assert not (rest := queue.frame()) or size(frame + rest[:1]) > FRAME_BYTES
        sent += frame
    return sent


@given(
    counts=st.lists(st.sampled_from([0, 1, 1000, 100_000, 2**18, 2**18 + 1]), max_size=12),
    choices=st.randoms(use_true_random=False),
)
def test_answers_go_in_order_in_frames_of_one_mebibyte_or_one_answer(
    counts: list[int], choices: random.Random
) -> None:
    queue = TokenizeQueue(encode, no_grammars)
    requests = [request(uid=uid, prompt_token_ids=pack([c])) for uid, c in enumerate(counts)]
    for one in requests:
        queue.add(one)
    answers: list[TokenizerToIngress] = []
    while not queue.idle:
        queue.work()
        if choices.random() < 0.3:
            answers += send_all(queue)
        assert queue.stats().queued == len(counts) - len(answers)
    answers += send_all(queue)
    assert answers == [encode(one) for one in requests]
    assert queue.stats().tokenized == len(counts)


def test_a_connection_to_the_ingress_begins_with_nothing_in_hand() -> None:
    queue = TokenizeQueue(encode, no_grammars)
    queue.add(request(uid=1))
    queue.add(request(uid=2))
    queue.work()
    queue.forget()
    assert queue.idle
    assert queue.frame() == []
    queue.add(request(uid=2))
    queue.work()
    assert [answer.uid for answer in queue.frame()] == [2]
