"""Which requests are sent when, and what is noted of them: the core, told the time."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.bench.arrivals import Arrival, Concurrency, Poisson, Trace
from nanovllm.bench.load import Load
from nanovllm.bench.prompts import (
    Conversation,
    Shape,
    Turn,
    file_conversations,
    random_conversations,
)
from nanovllm.bench.report import Used, details, report
from nanovllm.bench.work import Lengths
from nanovllm.client.results import RequestError
from nanovllm.protocol import Delta, Error, Finish, Generate, Sampling, ServerMessage, Usage

SHAPE = Shape(Lengths(3, 9), Lengths(1, 4))
STARTS_AT = 1000.0


def conversations(seed: int = 0, shape: Shape = SHAPE) -> Iterator[Conversation]:
    return random_conversations(seed, shape, Sampling(ignore_eos=True))


def finish(request: Generate, cached: int = 0) -> Finish:
    usage = Usage(len(request.prompt_token_ids or []), request.sampling.max_tokens, cached)
    return Finish(id=request.id, finish_reason="length", usage=usage)


def tokens(request: Generate, *token_ids: int, offset: int = 0, text: str = "") -> Delta:
    return Delta(id=request.id, offset=offset, token_ids=[*token_ids], text=text)


def sent_by(load: Load, now: float) -> list[Generate]:
    return list(load.due(now))


@given(st.integers(1, 8), st.integers(1, 20), st.randoms(use_true_random=False))
def test_a_closed_loop_keeps_its_number_until_the_last(
    concurrency: int, requests: int, draw: random.Random
) -> None:
    load = Load(Concurrency(concurrency), conversations(), STARTS_AT, requests=requests)
    now, open_requests, sent = STARTS_AT, [], 0
    while not load.over(now):
        for request in sent_by(load, now):
            open_requests.append(request)
            sent += 1
        assert (
            load.running == len(open_requests) == min(concurrency, requests - sent + load.running)
        )
        now += 1
        ended = open_requests.pop(draw.randrange(len(open_requests)))
        load.take([finish(ended)], now)
    assert sent == requests == load.conversations


@given(st.floats(0.5, 200), st.integers(0, 2**31), st.floats(0.01, 5))
def test_open_arrivals_do_not_wait_for_the_server(rate: float, seed: int, late: float) -> None:
    """Nothing is ever answered, and the loop comes late."""
    load = Load(Poisson(rate, -1.0, seed), conversations(), STARTS_AT, requests=30)
    now = STARTS_AT - 1
    while load.due_at(now) != math.inf:
        now = load.due_at(now) + late
        sent_by(load, now)
    due = [record.due_s for record in load.records]
    assert sum(record.measured for record in load.records) == 30
    assert due == sorted(due)
    assert all(record.sent_s >= record.due_s for record in load.records)
    again = Poisson(rate, -1.0, seed)
    for at in due:  # the same seed gives the same arrivals, whatever the loop did
        assert again.due_s(0, 99) == at
        again.started()
    assert max(r.sent_s - r.due_s for r in load.records) == pytest.approx(late)
    lateness = report(load.records, [], 100.0).generator.lateness_ms
    assert lateness is not None
    assert lateness.max == pytest.approx(
        1000 * max(r.sent_s - r.due_s for r in load.records if r.measured)
    )


def test_the_same_seed_gives_the_same_requests_however_long_the_warm_up() -> None:
    def run(warm_up_requests: int) -> list[Generate]:
        load = Load(
            Concurrency(1), conversations(7), STARTS_AT, warm_up=conversations(8), requests=5
        )
        for _ in range(warm_up_requests):
            (request,) = sent_by(load, STARTS_AT - 1)
            load.take([finish(request)], STARTS_AT - 1)
        measured = []
        while not load.over(STARTS_AT):
            measured += sent_by(load, STARTS_AT)
            load.take([finish(measured[-1])], STARTS_AT)
        return measured

    def what(requests: list[Generate]) -> list[object]:
        return [(request.prompt_token_ids, request.sampling) for request in requests]

    assert what(run(0)) == what(run(3))
    assert len({request.sampling.seed for request in run(0)}) == 5


def test_the_warm_up_is_apart_and_shares_no_cache() -> None:
    load = Load(Concurrency(1), conversations(), STARTS_AT, requests=1, salt="run")
    (early,) = sent_by(load, STARTS_AT - 0.5)
    load.take([tokens(early, 1), finish(early)], STARTS_AT + 0.5)
    (measured,) = sent_by(load, STARTS_AT + 0.5)
    load.take([tokens(measured, 1), finish(measured)], STARTS_AT + 1)
    assert early.cache_salt != measured.cache_salt == "run"
    figures = report(load.records, [], 1.0)
    assert (figures.warm_up_requests, figures.requests.sent) == (1, 1)
    assert figures.latencies_ms.whole is not None
    assert figures.latencies_ms.whole.max == pytest.approx(500)


def test_a_conversation_goes_on_with_what_was_answered() -> None:
    shape = Shape(Lengths(3, 3), Lengths(2, 2), shared_prefix=4, turns=2)
    load = Load(Concurrency(1), conversations(shape=shape), STARTS_AT, requests=2)
    prompts = []
    now = STARTS_AT
    while not load.over(now):
        (request,) = sent_by(load, now)
        prompts.append(request.prompt_token_ids or [])
        now += 1
        load.take([tokens(request, 11), tokens(request, 12, offset=1), finish(request)], now)
    first, second, other, _ = prompts
    assert second[: len(first) + 2] == [*first, 11, 12]
    assert [len(prompt) for prompt in prompts] == [7, 12, 7, 12]
    assert first[:4] == other[:4]
    assert first != other
    assert [record.turn for record in load.records] == [0, 1, 0, 1]


def test_a_chat_goes_on_with_the_answers_text() -> None:
    said = [[[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]]
    work = file_conversations(said, 0, 2, Lengths(5, 5), Sampling())
    load = Load(Concurrency(1), work, STARTS_AT, requests=1)
    (request,) = sent_by(load, STARTS_AT)
    load.take([tokens(request, 1, text="x"), tokens(request, 2, text="y"), finish(request)], 1001.0)
    (request,) = sent_by(load, 1001.0)
    assert request.messages == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "xy"},
        {"role": "user", "content": "b"},
    ]


def test_a_trace_is_replayed_with_its_lengths() -> None:
    trace = [Arrival(0.0, 5, 2), Arrival(0.5, None, 3), Arrival(2.0, 6, None)]
    work = random_conversations(0, SHAPE, Sampling(), trace)
    load = Load(Trace(trace, 0.0), work, STARTS_AT)
    assert load.due_at(STARTS_AT) == STARTS_AT
    sent = sent_by(load, STARTS_AT + 1)
    assert load.due_at(STARTS_AT + 1) == STARTS_AT + 2
    sent += sent_by(load, STARTS_AT + 2)
    assert len(sent[0].prompt_token_ids or []) == 5
    assert [request.sampling.max_tokens for request in sent[:2]] == [2, 3]
    assert len(sent[2].prompt_token_ids or []) == 6
    assert not load.over(STARTS_AT + 3)
    load.take([finish(request) for request in sent], STARTS_AT + 3)
    assert load.over(STARTS_AT + 3)


def test_after_its_seconds_nothing_more_is_sent() -> None:
    load = Load(Concurrency(1), conversations(), STARTS_AT, seconds=2.0)
    (request,) = sent_by(load, STARTS_AT + 1.9)
    load.take([finish(request)], STARTS_AT + 2.1)
    assert load.over(STARTS_AT + 2.1)


def test_the_figures_of_known_times() -> None:
    load = Load(Poisson(1e-9, 0, 0), [], STARTS_AT)
    turn = Turn([1, 2, 3, 4], Sampling(max_tokens=3))
    slow, failed, unfinished = (load.add([turn], STARTS_AT) for _ in range(3))
    answers: list[tuple[float, ServerMessage]] = [
        (0.1, tokens(slow, 7)),
        (0.3, tokens(slow, 8, 9, offset=1)),
        (0.4, finish(slow, cached=2)),
        (0.5, Error(id=failed.id, code="overloaded", message="full")),
        (0.6, tokens(unfinished, 1)),
    ]
    for at_s, message in answers:
        load.take([message], STARTS_AT + at_s)
    figures = report(load.records, [], 2.0, interrupted=True)
    assert figures.requests.finished == {"length": 1}
    assert figures.requests.errors == {"overloaded": 1}
    assert figures.requests.unfinished == 1
    assert figures.tokens.cached_share == 0.5
    assert figures.throughput.output_tokens == pytest.approx(2.0)
    assert figures.throughput.input_tokens == pytest.approx(2.0)
    latencies = figures.latencies_ms
    assert latencies.first_token is not None
    assert latencies.first_token.median == pytest.approx(350)
    assert latencies.per_token is not None
    assert latencies.per_token.mean == pytest.approx(100)
    assert latencies.between_deltas is not None
    assert latencies.between_deltas.mean == pytest.approx(200)
    assert figures.tokens.output == 4
    assert [detail.output_tokens for detail in details(load.records)] == [3, 0, 1]
    assert [detail.message for detail in details(load.records)] == ["", "full", ""]


def test_a_generator_that_is_the_bottleneck_is_told() -> None:
    load = Load(Trace([Arrival(0.0)], 0.0), conversations(), STARTS_AT)

    def warnings(loop_s: float) -> list[str]:
        used = [Used(-2.0, 0.0, 0.0, 0), Used(-0.1, 5.0, 5.0, 10), Used(9.9, 14.5, loop_s, 110)]
        generator = report(load.records, used, 9.9).generator
        assert generator.cpu_share == pytest.approx(0.95)
        assert generator.cpu_us_a_token == pytest.approx(95_000)
        return generator.warnings

    assert warnings(loop_s=6.0) == []
    (told,) = warnings(loop_s=14.0)
    assert "for 90% of the time" in told
    assert len(sent_by(load, STARTS_AT + 0.5)) == 1
    (told,) = warnings(loop_s=6.0)
    assert "sent more than 500 ms late" in told


def test_a_bottleneck_is_told_of_the_seconds_measured_alone() -> None:
    used = [Used(0.0, 0.0, 0.0, 0), Used(10.0, 9.0, 9.0, 100), Used(90.0, 9.5, 9.5, 200)]
    generator = report([], used, 90.0, seconds=10.0).generator
    assert generator.loop_share == pytest.approx(0.9)
    assert generator.cpu_us_a_token == pytest.approx(90_000)
    assert len(generator.warnings) == 1
    short = [Used(0.0, 0.0, 0.0, 0), Used(0.01, 0.01, 0.01, 2)]
    assert report([], short, 0.01).generator.warnings == []


def test_a_refusal_of_a_message_that_cannot_be_named_ends_the_run() -> None:
    load = Load(Concurrency(1), conversations(), STARTS_AT)
    sent_by(load, STARTS_AT)
    with pytest.raises(RequestError, match="too large"):
        load.take([Error(id=None, code="invalid_request", message="too large")], STARTS_AT)


def test_a_file_of_few_prompts_begins_again() -> None:
    work = file_conversations([["a"], ["b"]], 0, 1, Lengths(5, 5), Sampling())
    assert [turn.prompt for (turn,) in islice(work, 3)] == ["a", "b", "a"]
