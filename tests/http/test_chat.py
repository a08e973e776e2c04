"""Chats over HTTP, before a double of the ingress that says what a test wants."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from nanovllm.protocol import Abort, Accepted, Delta, Error, ErrorCode, Generate, Logprobs
from nanovllm.services.http import streams
from tests.client.double import (
    SEED,
    Answer,
    HangUp,
    Script,
    answer_in_full,
    finish,
    ingress,
    text_of,
    whole_answer,
)
from tests.client.test_client import has_abort, some_then_silence
from tests.http.server import HELLO, TIMEOUT_S, serving

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
OUTPUT = f"<think>\nHm.\n\nYes.\n</think>\n\nI look.\n\nNow.\n{CALL}\n{CALL}"
ANSWER_AT = OUTPUT.index("</think>") + len("</think>")
TOOLS = [{"type": "function", "function": {"name": "weather", "x-key": 1}}]


def writes(
    text: str, answer_at: int | None, cuts: list[int], logprobs: Logprobs | None = None
) -> Script:
    """A model that answers with this text, a token for each piece that ends at a cut."""

    def script(message: Any, session: str) -> Iterator[Answer]:
        if not isinstance(message, Generate):
            return
        fields = {} if answer_at is None else {"answer_at": answer_at}
        if not message.stream:
            yield finish(message, "stop", text=text, token_ids=[1], **fields)
            return
        yield Accepted(id=message.id, session=session, seed=SEED)
        for offset, (begin, end) in enumerate(pairwise([0, *cuts, len(text)])):
            delta = Delta(id=message.id, offset=offset, token_ids=[1], text=text[begin:end])
            if answer_at is not None and (begin < answer_at or begin == 0) and answer_at <= end:
                delta.answer_at = answer_at - begin
            if logprobs is not None:
                delta.logprobs = [logprobs[offset]]
            yield delta
        yield finish(message, "stop")

    return script


def joined(chunks: list[Any]) -> dict[str, Any]:
    """What the deltas of a stream's first choice say together."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            for key in ("content", "reasoning_content"):
                message[key] += delta.get(key) or ""
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(message["tool_calls"])
                    message["tool_calls"].append([call["function"]["name"], ""])
                message["tool_calls"][call["index"]][1] += call["function"]["arguments"]
    return message


def read_all(read: Callable[[int], bytes]) -> bytes:
    received = b""
    while not received.endswith(b"\r\n0\r\n\r\n") and (more := read(65536)):
        received += more
    return received


def test_an_answer_is_told_apart() -> None:
    with ingress(writes(OUTPUT, ANSWER_AT, [])) as double, serving(double.endpoint) as server:
        answer = server.chat(tools=TOOLS).json
    (choice,) = answer["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["role"] == "assistant"
    assert message["reasoning_content"] == "Hm.\n\nYes."
    assert message["content"] == "I look.\n\nNow."
    assert [call["type"] for call in message["tool_calls"]] == ["function", "function"]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    for call in message["tool_calls"]:
        assert call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"]) == {"city": "Zürich"}
    assert answer["usage"]["total_tokens"] == 3


@pytest.mark.parametrize(
    "cuts",
    [
        [],
        [ANSWER_AT],
        *([*range(8, ANSWER_AT - 8, size), *range(ANSWER_AT, 160, size)] for size in (1, 3)),
    ],
)
def test_a_stream_says_what_the_whole_does(cuts: list[int]) -> None:
    with ingress(writes(OUTPUT, ANSWER_AT, cuts)) as double, serving(double.endpoint) as server:
        answer = server.chat(tools=TOOLS, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last, usage = answer.chunks
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    message = joined(chunks)
    assert message["content"] == "I look.\n\nNow."
    assert message["reasoning_content"] == "Hm.\n\nYes."
    assert message["tool_calls"] == [["weather", '{"city": "Zürich"}']] * 2
    assert last["choices"] == [
        {"index": 0, "delta": {}, "finish_reason": "tool_calls", "logprobs": None}
    ]
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 2)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({chunk["id"] for chunk in answer.chunks}) == 1


@pytest.mark.parametrize(
    ("end", "reason"), [('rich"}}\n</tool_call>', "tool_calls"), ("rich, and no end", "stop")]
)
def test_arguments_come_while_they_are_written(end: str, reason: str) -> None:
    """Of a call that breaks, too: then all of its text is content as well."""
    begin = '<tool_call>{"name": "weather", "arguments": {"city": "Zü'
    seen = threading.Event()

    def script(message: Any, session: str) -> Iterator[Answer]:
        text, at = f"</think>{begin}{end}", len("</think>")
        for answer in writes(text, at, [at + len(begin)])(message, session):
            if isinstance(answer, Delta) and answer.offset:
                assert seen.wait(TIMEOUT_S)
            yield answer

    body = {"model": "demo", "messages": HELLO, "tools": TOOLS, "stream": True}
    with ingress(script) as double, serving(double.endpoint) as server:
        with server.send("/v1/chat/completions", body) as connection:
            received = b""
            while "Zü".encode() not in received:
                received += connection.recv(4096)
            seen.set()
            received += read_all(connection.recv)
        (whole,) = server.chat(tools=TOOLS).json["choices"]
    events = re.findall(r"data: (\{.*\})", received.decode())
    message = joined([json.loads(event) for event in events])
    complete = reason == "tool_calls"
    assert message["content"] == ("" if complete else begin + end)
    (call,) = message["tool_calls"]
    assert call[0] == "weather"
    assert call[1].startswith('{"city": "Zürich')
    assert call[1].endswith("}") == complete
    assert message["content"] == (whole["message"]["content"] or "")
    assert json.loads(events[-1])["choices"][0]["finish_reason"] == whole["finish_reason"] == reason


def test_output_that_ends_before_the_answer_is_reasoning() -> None:
    with ingress(writes("<think>So", None, [7])) as double, serving(double.endpoint) as server:
        message = server.chat().json["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("So", "")
        assert joined(server.chat(stream=True).chunks)["reasoning_content"] == "So"


@pytest.mark.parametrize(
    ("output", "answer", "content"),
    [
        ("<think>\n\n</think>\n\nHi\n", "\n\nHi", "Hi\n"),
        ("</think>\n\nHi", "\n\nHi", "Hi"),  # the prompt has begun the reasoning
        ("<think>Hm</think>\n\n", "\n\n", ""),
        ("<think>Hm</think>  Hi", "  Hi", "  Hi"),
        ("\n\nHi", "\n\nHi", "\n\nHi"),  # no reasoning
    ],
)
def test_an_answer_begins_behind_the_line_breaks_after_reasoning(
    output: str, answer: str, content: str
) -> None:
    at = output.index(answer)
    cuts = [*range(at or 1, len(output))]
    with ingress(writes(output, at, cuts)) as double, serving(double.endpoint) as server:
        assert server.chat().json["choices"][0]["message"]["content"] == content
        assert joined(server.chat(stream=True).chunks)["content"] == content


def test_without_tools_a_call_is_content() -> None:
    with ingress(writes(CALL, 0, [3])) as double, serving(double.endpoint) as server:
        for keys in ({}, {"tools": TOOLS, "tool_choice": "none"}):
            (choice,) = server.chat(**keys).json["choices"]
            assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")
        assert all(sent.tools is None for sent in double.generates)


def test_what_the_pipeline_is_asked() -> None:
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}], "x-key": {"a": None}},
        {"role": "assistant", "content": "Well,"},
    ]
    with ingress(answer_in_full) as double, serving(double.endpoint) as server:
        server.chat(
            messages=messages,
            tools=TOOLS,
            chat_template_kwargs={"enable_thinking": False},
            max_completion_tokens=3,
            max_tokens=4,
            seed=2**63 - 1,
            n=2,
            stop="\n",
            top_k=-1,
            top_p=0.5,
            logprobs=True,
            stop_token_ids=[7],
            ignore_eos=True,
            cache_salt="s",
            never_heard_of=1,
        )
        server.chat()
    first, second, plain = double.generates
    assert first.messages == [{"role": "system", "content": "Be kind."}, *messages[1:]]
    assert first.tools == TOOLS
    assert first.chat_template_kwargs == {"enable_thinking": False}
    assert first.continue_final_message
    assert (first.sampling.seed, second.sampling.seed) == (2**63 - 1, -(2**63))
    assert first.sampling.max_tokens == 3
    assert first.sampling.stop == ["\n"]
    assert (first.sampling.top_k, first.sampling.top_p) == (0, 0.5)
    assert first.sampling.logprobs == 0
    assert (first.sampling.stop_token_ids, first.sampling.ignore_eos) == ([7], True)
    assert (first.cache_salt, first.client) == ("s", "127.0.0.1")
    assert first.reasoning is not None
    # generation_config.json has a temperature and no more.
    assert (plain.sampling.temperature, plain.sampling.top_p) == (0.7, 1.0)
    assert plain.sampling.max_tokens == 4096
    assert not plain.continue_final_message


def test_choices_come_in_order_and_count_their_prompt_once() -> None:
    with ingress(answer_in_full) as double, serving(double.endpoint) as server:
        whole = server.chat(n=3, max_tokens=2).json
        chunks = server.chat(
            n=3, max_tokens=2, stream=True, stream_options={"include_usage": True}
        ).chunks
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    for usage in (whole["usage"], chunks[-1]["usage"]):
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (1, 6)
    finished = [c["index"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
    assert sorted(finished) == [0, 1, 2]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("invalid_request", 400),
        ("context_length_exceeded", 400),
        ("overloaded", 429),
        ("shutting_down", 503),
        ("poisoned", 500),
        ("internal", 500),
    ],
)
@pytest.mark.parametrize("keys", [{}, {"stream": True}, {"n": 2}])
def test_a_refusal_is_a_status(code: ErrorCode, status: int, keys: dict[str, Any]) -> None:
    def refuse(message: Any, _: str) -> Iterator[Answer]:
        if isinstance(message, Generate):
            yield Error(id=message.id, code=code, message="messages[0]: no")

    with ingress(refuse) as double, serving(double.endpoint) as server:
        answer = server.chat(**keys)
    assert answer.status == status
    assert (answer.headers["retry-after"] is not None) == (status in (429, 503))
    error = answer.json["error"]
    assert (error["message"], error["code"]) == ("messages[0]: no", code)
    assert error["param"] == "messages[0]"
    assert error["type"]


def test_a_stream_that_fails_midway_ends_with_an_error() -> None:
    streaming = threading.Event()

    def fail(message: Any, session: str) -> Iterator[Answer]:
        yield from some_then_silence(message, session)
        if isinstance(message, Generate):
            assert streaming.wait(TIMEOUT_S)
            yield Error(id=message.id, code="internal", message="broken")

    with ingress(fail) as double, serving(double.endpoint) as server:
        body = {"model": "demo", "messages": HELLO, "stream": True}
        with server.send("/v1/chat/completions", body) as connection:
            assert connection.recv(1)
            streaming.set()
            received = read_all(connection.recv).decode()
    _, error, done = received.rpartition("data: {")[2].partition('"message":"broken"')
    assert error
    assert done.partition("\n\n")[2].startswith("data: [DONE]\n\n")


def test_a_death_of_the_ingress_is_a_pause() -> None:
    deaths = [15, 9, 4]
    answered = 0

    def script(message: Any, session: str) -> Iterator[Answer]:
        nonlocal answered
        if not isinstance(message, Generate):
            return
        for answer in whole_answer(message, session):
            if isinstance(answer, Delta) and answer.offset == 0:
                answer.answer_at = 0
            yield answer
            answered += 1
            if deaths and answered >= deaths[-1]:
                deaths.pop()
                yield HangUp()

    with ingress(script) as double, serving(double.endpoint) as server:
        chunks = server.chat(stream=True, max_tokens=40).chunks
    assert not deaths
    assert joined(chunks)["content"] == text_of(list(range(40)))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_aborts(stream: bool, n: int) -> None:
    with ingress(some_then_silence) as double, serving(double.endpoint) as server:
        body = {"model": "demo", "messages": HELLO, "stream": stream, "n": n}
        connection = server.send("/v1/chat/completions", body)
        double.wait_for(lambda received: sum(isinstance(m, Generate) for m in received) == n)
        if stream:
            assert connection.recv(4)
        connection.close()
        double.wait_for(lambda received: sum(isinstance(m, Abort) for m in received) == n)


def test_a_refused_choice_aborts_the_others() -> None:
    def refuse_one(message: Any, session: str) -> Iterator[Answer]:
        if isinstance(message, Generate) and message.sampling.seed == 1:
            yield Error(id=message.id, code="overloaded", message="full")

    with ingress(refuse_one) as double, serving(double.endpoint) as server:
        for stream in (True, False):
            assert server.chat(n=2, seed=0, stream=stream).status == 429
        double.wait_for(lambda received: sum(isinstance(m, Abort) for m in received) == 2)


def test_a_comment_comes_while_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LOOK_S", 0.05)
    monkeypatch.setattr(streams, "COMMENT_S", 0.2)
    with ingress(some_then_silence) as double, serving(double.endpoint) as server:
        body = {"model": "demo", "messages": HELLO, "stream": True}
        with server.send("/v1/chat/completions", body) as connection:
            received = b""
            while received.count(b"\r\n: waiting\n\n\r\n") < 2:
                received += connection.recv(4096)


def writes_much(chars: int, deltas: int, *, ends: bool = False) -> Script:
    def script(message: Any, session: str) -> Iterator[Answer]:
        if isinstance(message, Generate):
            yield Accepted(id=message.id, session=session, seed=SEED)
            for offset in range(deltas):
                delta = Delta(id=message.id, offset=offset, token_ids=[1], text="x" * chars)
                delta.answer_at = 0
                yield delta
            if ends:
                yield finish(message)

    return script


def test_what_waits_for_a_slow_reader_is_merged() -> None:
    with ingress(writes_much(1000, 2000, ends=True)) as double, serving(double.endpoint) as server:
        body = {"model": "demo", "messages": HELLO, "stream": True}
        with server.send("/v1/chat/completions", body) as connection:
            assert connection.recv(1)
            assert server.chat(stream=True).body.count(b"x") >= 2_000_000, "others go on"
            received = read_all(connection.recv)
    assert received.count(b"x") >= 2_000_000
    assert received.count(b"data: ") < 1900


def test_a_reader_that_is_far_behind_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "LOOK_S", 0.05)
    with ingress(writes_much(10_000, 2000)) as double, serving(double.endpoint) as server:
        body = {"model": "demo", "messages": HELLO, "stream": True}
        with server.send("/v1/chat/completions", body):
            double.wait_for(has_abort)


def test_a_reader_that_takes_nothing_is_disconnected() -> None:
    with (
        ingress(writes_much(10_000, 600)) as double,
        serving(double.endpoint, takes_nothing_s=0.5) as server,
    ):
        body = {"model": "demo", "messages": HELLO, "stream": True}
        with server.send("/v1/chat/completions", body) as connection:
            double.wait_for(has_abort)
            with pytest.raises(ConnectionError):
                read_all(connection.recv)
