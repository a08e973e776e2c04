"""`--otlp`: each request is a trace, whatever happens to it, and to the collector."""

from __future__ import annotations

import http.client
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from benchmarks.support.pipeline import Pipeline
from nanovllm import Client, SamplingParams
from nanovllm.names import ServiceId
from nanovllm.tracing import TraceContext
from tests.http.server import Answer, Server
from tests.http.test_door import HTTP, SIM
from tests.recovery.streams import kill
from tests.traces.collector import TIMEOUT_S, Collector, collecting

PHASES = ["tokenizer", "queue", "prefill", "decode", "detokenizer"]
MESSAGES = [{"role": "user", "content": "Tell me a story about a fox."}]


class Traced(NamedTuple):
    pipeline: Pipeline
    door: Server
    collector: Collector


@pytest.fixture(scope="module")
def traced() -> Iterator[Traced]:
    with (
        collecting() as collector,
        Pipeline("", *SIM, *HTTP, "--otlp", collector.endpoint) as pipeline,
    ):
        yield Traced(pipeline, Server(pipeline.http_port), collector)


def new_context(*, sampled: bool = True) -> TraceContext:
    return TraceContext(secrets.randbits(127) + 1, secrets.randbits(63) + 1, sampled)


def ask(door: Server, path: str, traceparent: str | None, **keys: object) -> Answer:
    body = {"model": "demo", "max_tokens": 20, "messages": MESSAGES, **keys}
    headers = {} if traceparent is None else {"traceparent": traceparent}
    answer = door.ask("POST", path, body, headers)
    assert answer.status == 200, answer.body
    return answer


def check(spans: list[Span], parent_id: int) -> None:
    """One trace: the door is the caller's, the ingress the door's, and the phases the ingress's,
    one after another, which sum to the whole."""
    door, ingress, *phases = spans
    assert [door.name, ingress.name] == ["door", "ingress"]
    assert int.from_bytes(door.parent_span_id) == parent_id
    assert ingress.parent_span_id == door.span_id
    assert {span.parent_span_id for span in phases} == {ingress.span_id}
    assert len({span.span_id for span in spans}) == len(spans)
    check_phases(ingress, phases)
    assert door.start_time_unix_nano <= ingress.start_time_unix_nano
    assert ingress.end_time_unix_nano <= door.end_time_unix_nano


def check_phases(ingress: Span, phases: list[Span]) -> None:
    starts = [span.start_time_unix_nano for span in phases]
    ends = [span.end_time_unix_nano for span in phases]
    assert starts == [ingress.start_time_unix_nano, *ends[:-1]]
    assert all(start <= end for start, end in zip(starts, ends, strict=True))
    assert ends[-1] == ingress.end_time_unix_nano


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_over_http_is_one_trace(traced: Traced, path: str, stream: bool) -> None:
    context = new_context()
    answer = ask(traced.door, path, context.traceparent, stream=stream)
    spans = traced.collector.trace(context.trace_id, "door", "ingress")
    assert [span.name for span in spans] == ["door", "ingress", *PHASES]
    check(spans, context.span_id)
    steps = 20 * 4_000_000  # ns: of --sim-step-ms 4
    decode = next(span for span in spans if span.name == "decode")
    assert decode.end_time_unix_nano - decode.start_time_unix_nano > steps / 2
    assert traced.collector.services == {"nanovllm"}
    servers = [span.name for span in spans if span.kind == Span.SPAN_KIND_SERVER]
    assert servers == ["door", "ingress"]
    named = {a.key: a.value.string_value for a in spans[0].attributes}
    assert named["nanovllm.request_id"] == answer.headers["x-request-id"]


def test_each_choice_is_below_the_door(traced: Traced) -> None:
    context = new_context()
    ask(traced.door, "/v1/chat/completions", context.traceparent, n=3)
    door, *spans = traced.collector.trace(context.trace_id, "door", "ingress")
    choices = [span for span in spans if span.parent_span_id == door.span_id]
    assert [span.name for span in choices] == ["ingress"] * 3
    for choice in choices:
        phases = [span for span in spans if span.parent_span_id == choice.span_id]
        assert [span.name for span in phases] == PHASES
        check_phases(choice, phases)


def test_a_client_that_leaves_ends_its_trace(traced: Traced) -> None:
    context = new_context()
    body = {"model": "demo", "messages": MESSAGES, "ignore_eos": True, "stream": True}
    client = Server(traced.door.port, {"traceparent": context.traceparent})
    with client.send("/v1/chat/completions", body) as connection:
        while b"data: " not in connection.recv(4096):
            pass
    door, ingress, *phases = traced.collector.trace(context.trace_id, "door", "ingress")
    assert ingress.parent_span_id == door.span_id
    check_phases(ingress, phases)  # the ingress hears of it after the door
    ends = {a.key: a.value.string_value for a in ingress.attributes}
    assert ends["nanovllm.finish_reason"] == "abort"


def test_a_refusal_is_the_error_of_its_trace(traced: Traced) -> None:
    context = new_context()
    body = {"model": "demo", "prompt": "Once " * 5000}
    headers = {"traceparent": context.traceparent}
    answer = traced.door.ask("POST", "/v1/completions", body, headers)
    assert answer.status == 400
    spans = traced.collector.trace(context.trace_id, "door", "ingress")
    check(spans, context.span_id)
    assert "context_length_exceeded" in spans[1].status.message


@pytest.mark.parametrize("given", [None, "00-0-0-01", f"ff-{'1' * 32}-{'1' * 16}-01"])
def test_without_a_valid_traceparent_a_request_begins_a_trace(
    traced: Traced, given: str | None
) -> None:
    before = traced.collector.trace_ids
    ask(traced.door, "/v1/chat/completions", given)
    last = new_context()
    ask(traced.door, "/v1/chat/completions", last.traceparent)  # sent after it, at the latest
    traced.collector.trace(last.trace_id, "door", "ingress")
    (new,) = traced.collector.trace_ids - before - {last.trace_id}
    check(traced.collector.trace(new, "door", "ingress"), parent_id=0)


def test_of_two_traceparents_none_holds(traced: Traced) -> None:
    before = traced.collector.trace_ids
    contexts = [new_context(), new_context()]
    connection = http.client.HTTPConnection("127.0.0.1", traced.door.port, timeout=TIMEOUT_S)
    connection.putrequest("POST", "/v1/completions")
    for context in contexts:
        connection.putheader("traceparent", context.traceparent)
    connection.putheader("content-length", "2")
    connection.endheaders(b"{}")
    assert connection.getresponse().status == 400
    connection.close()
    last = new_context()
    ask(traced.door, "/v1/chat/completions", last.traceparent)
    traced.collector.trace(last.trace_id, "door", "ingress")
    (new,) = traced.collector.trace_ids - before - {last.trace_id}
    assert new not in [context.trace_id for context in contexts]


def test_a_span_holds_nothing_that_a_client_wrote(traced: Traced) -> None:
    context, secret = new_context(), "hunter2"
    header = {"traceparent": context.traceparent, "authorization": f"Bearer {secret}"}
    regex = {"regex": f"({secret}"}
    body = {"model": "demo", "messages": MESSAGES, "structured_outputs": regex}
    answer = traced.door.ask("POST", "/v1/chat/completions", body, header)
    assert secret in answer.json["error"]["message"]
    door, ingress, *_ = traced.collector.trace(context.trace_id, "door", "ingress")
    assert ingress.status.message == "invalid_request"
    assert secret not in f"{door} {ingress}"


def test_a_long_path_is_cut(traced: Traced) -> None:
    context = new_context()
    path = f"/v1/{'x' * 60_000}"
    answer = traced.door.ask("POST", path, {}, {"traceparent": context.traceparent})
    assert answer.status == 404
    (door,) = traced.collector.trace(context.trace_id, "door")
    assert len(door.SerializeToString()) < 1000


def test_what_is_not_sampled_is_not_sent(traced: Traced) -> None:
    unwanted, last = new_context(sampled=False), new_context()
    ask(traced.door, "/v1/chat/completions", unwanted.traceparent)
    ask(traced.door, "/v1/chat/completions", last.traceparent)
    traced.collector.trace(last.trace_id, "door", "ingress")
    assert unwanted.trace_id not in traced.collector.trace_ids


def test_the_client_gives_a_traceparent(traced: Traced) -> None:
    context = new_context()
    with Client(traced.pipeline.endpoint) as client:
        client.generate("Once", traceparent=context.traceparent)
        with pytest.raises(ValueError, match="traceparent: must be 00, the trace's id in 32"):
            client.generate("Once", traceparent="00-1-2-01")
    ingress, *phases = traced.collector.trace(context.trace_id, "ingress")
    assert int.from_bytes(ingress.parent_span_id) == context.span_id
    assert [span.name for span in phases] == PHASES
    check_phases(ingress, phases)


def test_a_stop_string_ends_decode(traced: Traced) -> None:
    context = new_context()
    with Client(traced.pipeline.endpoint) as client:
        params = SamplingParams(temperature=0.0, max_tokens=400, stop=["e"], ignore_eos=True)
        done = client.generate("Once", params, traceparent=context.traceparent)
    assert done.finish_reason == "stop"
    ingress, *phases = traced.collector.trace(context.trace_id, "ingress")
    assert [span.name for span in phases] == PHASES[:-1]
    check_phases(ingress, phases)


@pytest.mark.parametrize("role", ["scheduler", "detokenizer", "tokenizer"])
def test_a_kill_in_between_leaves_one_trace(traced: Traced, role: str) -> None:
    context = new_context()
    params = SamplingParams(max_tokens=300, ignore_eos=True, seed=1)
    with Client(traced.pipeline.endpoint) as client:
        stream = client.generate("Once", params, stream=True, traceparent=context.traceparent)
        next(stream)
        kill(traced.pipeline, ServiceId(role, 0))
        assert len(stream.result().token_ids) == 300
    ingress, *phases = traced.collector.trace(context.trace_id, "ingress")
    again = PHASES[1:4] if role == "scheduler" else []
    assert [span.name for span in phases] == [*PHASES[:1], *again, *PHASES[1:]]
    check_phases(ingress, phases)


def test_timings_are_in_the_usage_of_who_asks(traced: Traced) -> None:
    body = {"model": "demo", "max_tokens": 20, "messages": MESSAGES}
    began = time.monotonic()
    context = new_context()
    asked = {"x-nanovllm-timings": "1", "traceparent": context.traceparent}
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    path = "/v1/chat/completions"
    whole = traced.door.ask("POST", path, body, asked).json["usage"]["timings"]
    _, _, *phases = traced.collector.trace(context.trace_id, "door", "ingress")
    lengths = [(s.name, s.end_time_unix_nano - s.start_time_unix_nano) for s in phases]
    assert whole == [[name, ns // 1000] for name, ns in lengths], "as the trace says"
    last = traced.door.ask("POST", path, streamed, asked).chunks[-1]["usage"]["timings"]
    elapsed_us = (time.monotonic() - began) * 1e6
    for timings in (whole, last):
        assert [name for name, _ in timings] == PHASES
    assert sum(us for _, us in [*whole, *last]) <= elapsed_us
    assert "timings" not in traced.door.post(path, body).json["usage"]


def test_a_collector_that_hangs_holds_nothing_up(
    start_pipeline: Callable[..., Pipeline],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hangs:
        endpoint = f"http://127.0.0.1:{hangs.getsockname()[1]}"
        pipeline = start_pipeline("", *SIM, *HTTP, "--otlp", endpoint)
        door = Server(pipeline.http_port)
        for _ in range(20):
            ask(door, "/v1/chat/completions", None)
        assert pipeline.stop() == 0
