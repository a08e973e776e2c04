"""Sessions on the wire: resuming, aborting, leaving, and every refusal; on a simulated device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer

from benchmarks.support.pipeline import Pipeline
from nanovllm.checkpoint import DEMO_CHECKPOINT, ModelConfig
from nanovllm.control import SchedulerStats
from tests.pipeline.leftovers import wait_until_nothing_is_left
from tests.pipeline.wire import Answer, Wire

MAX_MODEL_LEN = 2048
SLOTS = 4
MAX_PENDING = 24
tokenizer = Tokenizer.from_file(str(DEMO_CHECKPOINT / "tokenizer.json"))
# Runs for MAX_MODEL_LEN steps unless somebody ends it.
LONG = {"sampling": {"max_tokens": MAX_MODEL_LEN, "seed": 1}}


@pytest.fixture(scope="module")
def sim() -> Iterator[Pipeline]:
    """Few slots and a small budget, so that requests can be met in every stage."""
    arguments = "--device sim --sim-step-ms 4 --kvcache-block-size 16 --max-num-batched-tokens 16"
    limits = ["--max-num-seqs", str(SLOTS), "--max-pending-requests", str(MAX_PENDING)]
    limits += ["--max-model-len", str(MAX_MODEL_LEN)]
    with Pipeline("", *arguments.split(), *limits) as running:
        yield running


@pytest.fixture
def connect(sim: Pipeline) -> Iterator[Callable[..., Wire]]:
    """Makes clients. After the test they leave, and nothing may be left of their requests."""
    connected: list[Wire] = []

    def connect() -> Wire:
        connected.append(Wire(sim.endpoint))
        return connected[-1]

    yield connect
    for wire in connected:
        wire.close()
    wait_until_nothing_is_left(sim)


def prompt(length: int) -> list[int]:
    return [300 + place % 500 for place in range(length)]


def asking(length: int = 3, **keys: Any) -> dict[str, Any]:
    return {"prompt_token_ids": prompt(length), **LONG, **keys}


def decode(token_ids: list[int]) -> str:
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True)
    return text


# Resuming ---------------------------------------------------------------------------------------


def test_a_resumed_stream_goes_on_where_it_was(connect: Callable[..., Wire]) -> None:
    wire = connect()
    request = asking(sampling={"max_tokens": 30, "seed": 5, "logprobs": 0})
    whole = wire.ask(**request)
    wire.results(whole)
    assert whole.start == 0
    for count in (0, 1, 13, 29):
        had = whole.token_ids[:count]
        stream = wire.ask(**request, resume_token_ids=had)
        at_once = wire.ask(**request, resume_token_ids=had, stream=False)
        wire.results(stream, at_once)
        assert stream.start == count
        for answer in (stream, at_once):
            assert answer.token_ids == whole.token_ids[count:]
            assert [entry[0][0] for entry in answer.logprobs] == answer.token_ids
            assert decode(had).rstrip("\ufffd") + answer.text == whole.text
            assert answer.finish.usage.prompt_tokens == whole.finish.usage.prompt_tokens == 3
            assert answer.finish.usage.completion_tokens == 30
            assert answer.finish.finish_reason == "length"
            assert answer.seed == 5


@pytest.mark.parametrize("stream", [True, False])
def test_resumed_tokens_that_end_the_request_already(
    connect: Callable[..., Wire], stream: bool
) -> None:
    wire = connect()
    eos = (ModelConfig.from_checkpoint(DEMO_CHECKPOINT).eos_token_ids or [])[0]
    words = tokenizer.encode(" one two three four").ids
    cases: list[tuple[list[int], dict[str, Any], str]] = [
        (words, {"max_tokens": len(words)}, "length"),
        ([*words, eos], {"max_tokens": 100}, "stop"),
        ([*words, 77], {"max_tokens": 100, "stop_token_ids": [77]}, "stop"),
        ([*words, 77], {"max_tokens": len(words) + 1, "stop_token_ids": [77]}, "stop"),
        ([*words, eos], {"max_tokens": len(words) + 1, "ignore_eos": True}, "length"),
        (words, {"max_tokens": 100, "stop": ["o thr"]}, "stop"),
        (words, {"max_tokens": len(words), "stop": ["o thr"]}, "stop"),
    ]
    for tokens, sampling, reason in cases:
        answer = wire.ask(
            **{**asking(), "sampling": sampling}, resume_token_ids=tokens, stream=stream
        )
        wire.results(answer)
        assert answer.token_ids == []
        assert answer.text == ""
        assert answer.finish.finish_reason == reason, sampling
        assert answer.finish.usage.prompt_tokens == 3
        assert answer.finish.usage.completion_tokens == len(tokens)


def test_a_resumed_request_fills_the_model_length(connect: Callable[..., Wire]) -> None:
    wire = connect()
    room = MAX_MODEL_LEN - 1000
    full, one_left = (
        wire.ask(**asking(1000), resume_token_ids=prompt(count)) for count in (room, room - 1)
    )
    too_long = wire.ask(**asking(1000), resume_token_ids=prompt(room + 1))
    wire.results(full, one_left, too_long)
    assert (full.token_ids, full.finish.finish_reason) == ([], "length")
    assert (len(one_left.token_ids), one_left.finish.finish_reason) == (1, "length")
    assert too_long.error.code == "context_length_exceeded"
    assert "resume_token_ids" in too_long.error.message


# Identities -------------------------------------------------------------------------------------


def test_an_id_is_unique_among_the_unfinished_of_its_session(connect: Callable[..., Wire]) -> None:
    wire, other = connect(), connect()
    first = wire.ask(id="a", **asking(sampling={"max_tokens": 400}))
    elsewhere = other.ask(id="a", **asking(sampling={"max_tokens": 20}))
    wire.until(lambda: first.deltas)
    wire.say({"type": "generate", "id": "a", **asking()})
    wire.until(lambda: wire.refused)
    assert [(error.id, error.code) for error in wire.refused] == [("a", "duplicate_id")]
    other.results(elsewhere)
    wire.results(first)
    assert len(first.token_ids) == 400, "the one that has the id goes on"
    assert len(elsewhere.token_ids) == 20, "another session may have it as well"
    again = wire.ask(id="a", **asking(sampling={"max_tokens": 2}))
    wire.results(again)
    assert len(again.token_ids) == 2, "once finished, the id is free"
    assert first.accepted is not None
    assert elsewhere.accepted is not None
    assert first.accepted.session != elsewhere.accepted.session


def test_a_ping_tells_the_session(connect: Callable[..., Wire]) -> None:
    wire, other = connect(), connect()
    pong = wire.ping()
    assert (pong.ready, pong.model) == (True, "demo")
    (answer,) = wire.run(asking(sampling={"max_tokens": 3}))
    assert answer.accepted is not None
    assert pong.session == answer.accepted.session == wire.ping().session
    assert other.ping().session != pong.session


# Aborting and leaving ---------------------------------------------------------------------------


def busy(wire: Wire) -> list[Answer]:
    """Takes all slots, until aborted or left."""
    answers = wire.ask_all([asking()] * SLOTS)
    wire.until(lambda: all(answer.deltas for answer in answers))
    return answers


def long_prefills(wire: Wire) -> list[Answer]:
    """Takes all slots, for a hundred steps of prefill each, one after the other."""
    salt = str(len(wire.answers))
    answers = wire.ask_all([asking(1900, cache_salt=f"{salt} {n}") for n in range(SLOTS)])
    wire.until(lambda: all(answer.accepted for answer in answers))
    return answers


def test_an_abort_in_every_stage(sim: Pipeline, connect: Callable[..., Wire]) -> None:
    wire = connect()
    decoding = busy(wire)
    queued = wire.ask_all([asking(), asking(stream=False)])
    wire.until(lambda: queued[0].accepted)
    wire.abort(*queued)
    wire.results(*queued)
    wire.abort(*decoding, *queued)
    wire.results(*decoding)
    in_prefill = long_prefills(wire)
    wire.abort(*in_prefill)
    wire.results(*in_prefill)
    at_once = wire.ask(**asking(500))
    wire.abort(at_once)
    wire.say({"type": "abort", "id": "unknown"})
    wire.results(at_once)
    for answer in (*decoding, *queued, *in_prefill, at_once):
        assert answer.finish.finish_reason == "abort"
        assert answer.finish.usage.completion_tokens == len(answer.token_ids)
    assert not any(answer.deltas for answer in (*queued, in_prefill[-1]))
    wait_until_nothing_is_left(sim)
    assert not wire.refused


def test_clients_that_leave_in_every_stage(sim: Pipeline, connect: Callable[..., Wire]) -> None:
    streaming, queued, whole, stays, in_prefill = (connect() for _ in range(5))
    busy(streaming)
    waiting = queued.ask(**asking())
    queued.until(lambda: waiting.accepted)
    whole.ask(**asking(), stream=False)
    whole.ping()
    last = stays.ask(**asking(sampling={"max_tokens": 50}))
    stays.until(lambda: last.accepted)
    sim.stats_once(SchedulerStats, lambda stats: (stats.running, stats.waiting) == (SLOTS, 3))
    for wire in (queued, whole, streaming):
        wire.close()
    stays.results(last)
    assert len(last.token_ids) == 50, "who stays has its turn, and all its tokens"
    long_prefills(in_prefill)
    in_prefill.close()
    wait_until_nothing_is_left(sim)


def test_a_client_that_leaves_at_once(sim: Pipeline, connect: Callable[..., Wire]) -> None:
    for number in range(20):
        wire = connect()
        wire.ask_all([asking(1 + 20 * number)] * 3)
        if number % 2:
            wire.ping()
        wire.close()
    wait_until_nothing_is_left(sim)


# Refusals ---------------------------------------------------------------------------------------


def test_prompts_that_are_too_long(connect: Callable[..., Wire]) -> None:
    wire = connect()
    words = " harbour" * (MAX_MODEL_LEN - 1)
    assert len(tokenizer.encode(words).ids) >= MAX_MODEL_LEN - 1
    answers = wire.ask_all(
        [
            {"prompt_token_ids": prompt(MAX_MODEL_LEN)},
            {"prompt": "😀" * MAX_MODEL_LEN},
            {"messages": [{"role": "user", "content": words + words}]},
            {"prompt_token_ids": prompt(MAX_MODEL_LEN), "stream": False},
        ]
    )
    fits = wire.ask(prompt_token_ids=prompt(MAX_MODEL_LEN - 1), sampling={"max_tokens": 9})
    wire.results(*answers, fits)
    for answer in answers:
        assert answer.error.code == "context_length_exceeded"
        assert f"max_model_len ({MAX_MODEL_LEN}" in answer.error.message
        assert answer.accepted is None
    assert len(fits.token_ids) == 1, "max_tokens is clipped to what fits"
    assert fits.finish.finish_reason == "length"


def test_a_text_far_too_long_is_not_tokenized(connect: Callable[..., Wire]) -> None:
    """8 MiB, which would take a tokenizer seconds: refused for its bytes."""
    wire = connect()
    content = "x" * ((8 << 20) - 200)
    for keys in ({"prompt": content}, {"messages": [{"role": "user", "content": content}]}):
        answer = wire.ask(**keys)
        wire.results(answer)
        assert answer.error.code == "context_length_exceeded"
        assert "bytes" in answer.error.message
    wire.say({"type": "generate", "id": "beyond", "prompt": "x" * (8 << 20)})
    wire.until(lambda: wire.refused)
    assert wire.refused[0].code == "invalid_request"
    assert "max_message_bytes" in wire.refused[0].message


def test_more_requests_than_may_be_held(sim: Pipeline, connect: Callable[..., Wire]) -> None:
    """A client has half of them; another one is not shut out."""
    wire, other = connect(), connect()
    half = MAX_PENDING // 2
    held = wire.ask_all([asking(stream=number % 2 == 0) for number in range(half)])
    refused = wire.ask_all([asking()] * 5)
    wire.results(*refused)
    for answer in refused:
        assert answer.error.code == "overloaded"
        assert str(MAX_PENDING) in answer.error.message
    (taken,) = other.ask_all([asking(sampling={"max_tokens": 4})])
    other.until(lambda: taken.accepted)
    wire.abort(*held)
    wire.results(*held)
    other.results(taken)
    assert len(taken.token_ids) == 4


def test_a_bad_message_leaves_its_neighbours_alone(connect: Callable[..., Wire]) -> None:
    wire = connect()
    few: dict[str, Any] = {"prompt": "x", "sampling": {"max_tokens": 3}}
    first = wire.ask(**few)
    bad = wire.ask(**{**few, "sampling": {"temperature": -1}})
    message = msgspec.msgpack.encode({"type": "generate", "id": "nobody", **few})
    array = msgspec.msgpack.encode([{"type": "ping"}, {"type": "ping"}])
    wire.send(array)
    wire.send(b"", message)
    wire.send(message, message)
    last = wire.ask(**few)
    wire.results(first, bad, last)
    assert len(first.token_ids) == len(last.token_ids) == 3
    assert bad.error.code == "invalid_request"
    assert "temperature" in bad.error.message
    assert [(error.id, error.code) for error in wire.refused] == [(None, "invalid_request")] * 3
    assert all("one frame with one MessagePack map" in error.message for error in wire.refused)
    assert not wire.pongs
