"""Where the time of a request goes: phases without a gap, whatever happens to it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.messages import Refused, Submit, Timings
from nanovllm.protocol import Error, Finish
from nanovllm.tracing import NO_SPAN, Span, TraceContext
from nanovllm.transport.links import Peer
from tests.ingress.harness import REBORN, SCHEDULER, TOKENIZER, World, decoded
from tests.ingress.test_engines import Engines

TRACE, PARENT = 0xABC, 0xDEF
SAMPLED = TraceContext(TRACE, PARENT, True).traceparent
NOT_SAMPLED = TraceContext(TRACE, PARENT, False).traceparent
MS = 1_000_000


class Recorded:
    """A tracer that begins a trace where none is given."""

    def __init__(self) -> None:
        self.traces: list[list[Span]] = []

    def parent(self, traceparent: str | None) -> TraceContext:
        if traceparent is None:
            return TraceContext(7, NO_SPAN, True)
        return TraceContext.of(traceparent)

    def add(self, spans: list[Span]) -> None:
        self.traces.append(spans)


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


@pytest.fixture
def world(recorded: Recorded) -> World:
    return World(tracer=recorded)


def later(world: World, ms: int) -> None:
    world.now_ns += ms * MS


def started(world: World, **keys: Any) -> Submit:
    """A request whose tokenizer takes 5 ms, and which then waits 1 ms for the scheduler."""
    world.generate(**keys)
    later(world, 5)
    world.tokenized(*world.tokenizes())
    later(world, 1)
    (submit,) = world.submits()
    return submit


def ends(world: World, of: Submit, decode_us: int | None) -> None:
    """After 2 ms in the scheduler's queue, and 3 of prefill."""
    answer = decoded(of, 0, [1, 2], end=True)
    answer.timings = Timings(2_000, 3_000, decode_us)
    world.core.from_detokenizer(answer)


def phases(spans: list[Span]) -> list[tuple[str, float, float]]:
    return [(span.name, span.start_ns / MS, span.end_ns / MS) for span in spans]


def test_a_request_is_a_span_with_its_phases(world: World, recorded: Recorded) -> None:
    submit = started(world, traceparent=SAMPLED)
    assert submit.timed
    later(world, 20)
    ends(world, submit, decode_us=10_000)
    later(world, 1)
    assert recorded.traces == []
    world.sent()
    (spans,) = recorded.traces
    assert phases(spans) == [
        ("ingress", 0, 26),
        ("tokenizer", 0, 5),
        ("queue", 5, 8),
        ("prefill", 8, 11),
        ("decode", 11, 21),
        ("detokenizer", 21, 26),
    ]
    whole, *parts = spans
    assert {span.context.trace_id for span in spans} == {TRACE}
    assert whole.parent_id == PARENT
    assert {span.parent_id for span in parts} == {whole.context.span_id}
    assert len({span.context.span_id for span in spans}) == len(spans)
    assert whole.attributes["gen_ai.usage.output_tokens"] == 2


def test_a_stop_string_leaves_decode_until_its_text_is_there(
    world: World, recorded: Recorded
) -> None:
    submit = started(world)
    later(world, 20)
    ends(world, submit, decode_us=None)
    world.sent()
    assert phases(recorded.traces[0])[-1] == ("decode", 11, 26)


def test_a_phase_names_its_engine(recorded: Recorded) -> None:
    engines = Engines(tracer=recorded)
    first, _ = engines.ask("a", [1, 2, 3], traceparent=SAMPLED)
    engines.ready(SCHEDULER, False)
    ((second, submit),) = engines.given()
    engines.finish(submit, [1])
    engines.sent()
    (spans,) = recorded.traces
    named = [(span.name, span.attributes.get("nanovllm.engine")) for span in spans]
    assert (first, second) == (0, 1)
    assert named == [("ingress", None), ("tokenizer", None), ("queue", 0), ("queue", 1)]


def test_a_lost_attempt_ends_in_its_phase(world: World, recorded: Recorded) -> None:
    submit = started(world)
    later(world, 14)
    first = decoded(submit, 0, [1])
    first.timings = Timings(2_000, 3_000)
    world.core.from_detokenizer(first)
    later(world, 10)
    world.scheduler_restarts(REBORN)
    (again,) = world.submits()
    later(world, 2)
    world.scheduler_restarts(Peer("scheduler", 0, 15))  # before the second has a token
    (third,) = world.submits()
    later(world, 8)
    end = decoded(third, 1, [2], end=True)
    end.timings = Timings(1_000, 4_000, 2_000)
    world.core.from_detokenizer(end)
    world.sent()
    assert again.attempt == 2
    (spans,) = recorded.traces
    attempts = [span.attributes.get("nanovllm.attempt", 0) for span in spans[1:]]
    assert list(zip(phases(spans)[1:], attempts, strict=True)) == [
        (("tokenizer", 0, 5), 0),
        (("queue", 5, 8), 1),
        (("prefill", 8, 11), 1),
        (("decode", 11, 30), 1),
        (("queue", 30, 32), 2),
        (("queue", 32, 33), 3),
        (("prefill", 33, 37), 3),
        (("decode", 37, 39), 3),
        (("detokenizer", 39, 40), 3),
    ]


def test_without_a_sampled_trace_nothing_is_timed(world: World, recorded: Recorded) -> None:
    submit = started(world, traceparent=NOT_SAMPLED)
    assert not submit.timed
    ends(world, submit, None)
    (*_, finish) = world.heard()
    assert recorded.traces == []
    assert isinstance(finish, Finish)
    assert not finish.usage.timings


def test_who_asks_is_told_the_phases_without_a_tracer() -> None:
    world = World()
    submit = started(world, timings=True, stream=False)
    later(world, 20)
    ends(world, submit, decode_us=10_000)
    (finish,) = world.heard()
    assert isinstance(finish, Finish)
    assert finish.usage.timings == [
        ("tokenizer", 5_000),
        ("queue", 3_000),
        ("prefill", 3_000),
        ("decode", 10_000),
        ("detokenizer", 5_000),
    ]


def test_refused_aborted_and_left_requests_are_traces_too(world: World, recorded: Recorded) -> None:
    world.generate("a")
    (tokenize,) = world.tokenizes()
    later(world, 4)
    world.core.from_tokenizer(TOKENIZER, Refused(tokenize.uid, "invalid_request", "no"))
    assert isinstance(world.heard()[-1], Error)
    (refused,) = recorded.traces
    assert phases(refused) == [("ingress", 0, 4), ("tokenizer", 0, 4)]
    assert refused[0].error == "invalid_request"
    started(world, request_id="b")
    world.abort("b")
    world.sent()
    assert phases(recorded.traces[1])[-1] == ("queue", 9, 10)
    started(world, request_id="c")
    world.core.closed(b"\x00cli1")
    assert [name for name, *_ in phases(recorded.traces[2])] == ["ingress", "tokenizer", "queue"]
    for aborted in recorded.traces[1:]:
        assert aborted[0].attributes["nanovllm.finish_reason"] == "abort"


@given(
    st.lists(st.integers(0, 50), min_size=6, max_size=6),
    st.integers(0, 100_000),
    st.integers(0, 100_000),
    st.integers(0, 100_000) | st.none(),
)
def test_phases_sum_to_the_whole_whatever_is_reported(
    waits: list[int], queue_us: int, prefill_us: int, decode_us: int | None
) -> None:
    recorded = Recorded()
    world = World(tracer=recorded)
    submit = started(world, traceparent=SAMPLED)
    for wait in waits:
        later(world, wait)
    answer = decoded(submit, 0, [1], end=True)
    answer.timings = Timings(queue_us, prefill_us, decode_us)
    world.core.from_detokenizer(answer)
    world.sent()
    whole, *parts = recorded.traces[0]
    assert parts[0].start_ns == whole.start_ns
    assert parts[-1].end_ns == whole.end_ns
    assert all(span.start_ns <= span.end_ns for span in parts)
    assert [span.end_ns for span in parts[:-1]] == [span.start_ns for span in parts[1:]]
