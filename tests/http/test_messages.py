"""Anthropic's Messages, with the `anthropic` package as a client.

It takes seconds to import, so tests do that: every process collects this file, and one runs it.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from nanovllm.protocol import Error, ErrorCode, Finish
from tests.client.double import Answer, ingress
from tests.http.server import HELLO, TIMEOUT_S, Server, serving
from tests.http.test_chat import ANSWER_AT, OUTPUT, writes

STORY: Any = [{"role": "user", "content": "Tell me a story."}]
WEATHER: Any = {"name": "weather", "input_schema": {"type": "object", "properties": {}}}
ASKED: dict[str, Any] = {"model": "demo", "messages": HELLO, "max_tokens": 100}
CALL: Any = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
IMAGE: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}


@contextlib.contextmanager
def client_of(server: Server) -> Iterator[Any]:
    import anthropic

    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with client_of(server) as client:
        yield client


@pytest.mark.parametrize("cuts", [[], [ANSWER_AT], list(range(8, ANSWER_AT - 8, 3))])
def test_an_answer_is_told_apart(cuts: list[int]) -> None:
    asked: dict[str, Any] = {**ASKED, "tools": [WEATHER], "thinking": {"type": "adaptive"}}
    with (
        ingress(writes(OUTPUT, ANSWER_AT, cuts)) as double,
        serving(double.endpoint) as server,
        client_of(server) as client,
    ):
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
    for answer in (whole, streamed):
        thinking, text, *calls = answer.content
        assert thinking.type == "thinking"
        assert thinking.thinking == "Hm.\n\nYes."
        assert thinking.signature
        assert text.type == "text"
        assert text.text == "I look.\n\nNow."
        assert len(calls) == 2
        for call in calls:
            assert call.type == "tool_use"
            assert (call.name, call.input) == ("weather", {"city": "Zürich"})
        assert answer.stop_reason == "tool_use"
        assert answer.stop_sequence is None
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (1, 2)


def test_events_come_in_order() -> None:
    text = "<think>\nHm\n</think>\nYes."
    at = text.index("\nYes")
    asked = {**ASKED, "stream": True}
    with (
        ingress(writes(text, at, [9, 10, at, at + 2])) as double,
        serving(double.endpoint) as server,
    ):
        events = server.post("/v1/messages", asked).events
    start, *blocks, delta, stop = events
    assert start["message"]["content"] == []
    assert [(e["type"], e["index"]) for e in blocks if "delta" not in e] == [
        *(("content_block_start", 0), ("content_block_stop", 0)),
        *(("content_block_start", 1), ("content_block_stop", 1)),
    ]
    deltas = [(e["index"], e["delta"]["type"]) for e in blocks if "delta" in e]
    assert dict.fromkeys(deltas) == dict.fromkeys(
        [(0, "thinking_delta"), (0, "signature_delta"), (1, "text_delta")]
    )
    assert delta["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert stop == {"type": "message_stop"}


def test_a_call_that_breaks_is_text_alone() -> None:
    """Clients take what has come of a call's input for all of it."""
    text = '<tool_call>{"name": "weather", "arguments": {"city": "Zü'
    asked: dict[str, Any] = {**ASKED, "tools": [WEATHER]}
    with (
        ingress(writes(text, 0, [30, 50])) as double,
        serving(double.endpoint) as server,
        client_of(server) as client,
    ):
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
    for answer in (whole, streamed):
        assert [block.to_dict() for block in answer.content if block.type == "text"] == [
            {"type": "text", "text": text, "citations": None}
        ]
        assert len(answer.content) == 1
        assert answer.stop_reason == "end_turn"


def test_thinking_that_is_omitted_has_no_text() -> None:
    asked = {**ASKED, "thinking": {"type": "enabled", "budget_tokens": 9, "display": "omitted"}}
    with ingress(writes(OUTPUT, ANSWER_AT, [3])) as double, serving(double.endpoint) as server:
        whole = server.post("/v1/messages", asked).json
        events = server.post("/v1/messages", {**asked, "stream": True}).events
        sent = [message.chat_template_kwargs for message in double.generates]
    assert whole["content"][0]["thinking"] == ""
    assert not [event for event in events if "Hm." in json.dumps(event)]
    assert sent == [{"enable_thinking": True}] * 2


@pytest.mark.parametrize("stop", [["forest", "."], ["e", "the"], [" a ", "zzz"]])
def test_a_stop_sequence_is_told_and_cut(client: Any, server: Server, stop: list[str]) -> None:
    asked: dict[str, Any] = {
        "model": "demo",
        "messages": STORY,
        "max_tokens": 120,
        "stop_sequences": stop,
        "extra_body": {"seed": 5},
    }
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    chat = server.chat(
        messages=STORY,
        max_tokens=120,
        stop=stop,
        seed=5,
        chat_template_kwargs={"enable_thinking": False},
        include_stop_str_in_output=True,
    ).json["choices"][0]["message"]["content"]
    assert whole.stop_reason == "stop_sequence"
    for answer in (whole, streamed):
        (block,) = answer.content
        assert block.type == "text"
        assert answer.stop_sequence in stop
        assert block.text + str(answer.stop_sequence) == chat
        assert answer.stop_reason == "stop_sequence"


def test_the_end_is_told(client: Any) -> None:
    assert client.messages.create(model="demo", messages=STORY, max_tokens=3).stop_reason == (
        "max_tokens"
    )
    full = client.messages.create(
        model="demo",
        messages=[{"role": "user", "content": "a " * 3900}],
        max_tokens=4096,
        extra_body={"ignore_eos": True},
    )
    assert full.stop_reason == "model_context_window_exceeded"


def test_tokens_are_counted_as_the_pipeline_does(client: Any) -> None:
    asked: dict[str, Any] = {
        "model": "demo",
        "system": [
            {"type": "text", "text": "Be short. " * 200, "cache_control": {"type": "ephemeral"}}
        ],
        "tools": [WEATHER],
        "messages": [
            *STORY,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"a": [1]}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain"},
                    {"type": "text", "text": "And now?"},
                ],
            },
        ],
    }
    counted = client.messages.count_tokens(**asked).input_tokens
    seen = []
    for _ in range(2):
        usage = client.messages.create(**asked, max_tokens=4).usage
        assert usage.cache_read_input_tokens is not None
        assert usage.input_tokens + usage.cache_read_input_tokens == counted
        seen.append(usage.cache_read_input_tokens)
    assert seen[1] > 0, "the second time the prefix cache has the prompt"


@pytest.mark.parametrize(
    ("code", "kind", "error_type"),
    [
        ("invalid_request", "BadRequestError", "invalid_request_error"),
        ("context_length_exceeded", "BadRequestError", "invalid_request_error"),
        ("overloaded", "InternalServerError", "overloaded_error"),
        ("shutting_down", "InternalServerError", "api_error"),
        ("internal", "InternalServerError", "api_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_the_form_that_clients_read(
    code: ErrorCode, kind: str, error_type: str, stream: bool
) -> None:
    import anthropic

    def refuses(message: Any, session: str) -> Iterator[Answer]:
        yield Error(id=message.id, code=code, message="no")

    with ingress(refuses) as double, serving(double.endpoint) as server:
        with client_of(server) as client, pytest.raises(getattr(anthropic, kind)) as refused:
            client.messages.create(**ASKED, stream=stream)
        body = refused.value.body
    assert isinstance(body, dict)
    assert body["type"] == "error"
    assert body["error"]["type"] == error_type
    assert body["request_id"] == refused.value.response.headers["request-id"]
    assert (refused.value.status_code == 529) is (code == "overloaded")
    assert ("prompt is too long" in body["error"]["message"]) is (code[:7] == "context")


def test_a_stream_that_fails_ends_with_an_error() -> None:
    import anthropic

    seen = threading.Event()

    def fails(message: Any, session: str) -> Iterator[Answer]:
        for answer in writes("Hello, world.", 0, [5])(message, session):
            if not isinstance(answer, Finish):
                yield answer
            else:
                assert seen.wait(TIMEOUT_S)
                yield Error(id=message.id, code="internal", message="it broke")

    names: list[str] = []

    def read(stream: Iterable[Any]) -> None:
        for event in stream:
            names.append(event.type)
            seen.set()

    with (
        ingress(fails) as double,
        serving(double.endpoint) as server,
        client_of(server) as client,
        pytest.raises(anthropic.APIStatusError, match="it broke") as failed,
    ):
        read(client.messages.create(**ASKED, stream=True))
    assert isinstance(failed.value.body, dict)
    assert failed.value.body["error"] == {"type": "api_error", "message": "it broke"}
    assert "message_start" in names
    assert "message_stop" not in names


def user(*blocks: Any) -> list[Any]:
    return [{"role": "user", "content": [*blocks]}]


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role: Invalid"),
        ({"messages": user(IMAGE)}, "no images"),
        (
            {"messages": user({"type": "tool_result", "tool_use_id": "1", "content": [IMAGE]})},
            "no im",
        ),
        (
            {"messages": user({"type": "tool_use", "id": "1", "name": "f", "input": {}})},
            "assistant",
        ),
        ({"messages": [{"role": "assistant", "content": [{"type": "text"}]}]}, "content[0].text"),
        ({"system": [IMAGE]}, "system[0].type"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "that the client runs",
        ),
        ({"tools": [{**WEATHER, "type": "bash_20250124"}]}, "that the client runs"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "f"}, "tools": [WEATHER]}, "no tool 'f'"),
        ({"tool_choice": {"type": "bot"}}, "must be auto, any, tool or none"),
        ({"thinking": {"type": "between_tools"}}, "must be enabled, adaptive or disabled"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"container": "x"}, "container: is not served"),
        ({"mcp_servers": [{}]}, "mcp_servers: is not served"),
        ({"speed": "fast"}, "speed: is not served"),
        ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, "edits[0].type"),
        (
            {"output_config": {"format": {"type": "yaml", "schema": {}}}},
            "output_config.format.type",
        ),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "output_c"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    server: Server, keys: dict[str, Any], named: str
) -> None:
    answer = server.post("/v1/messages", {**ASKED, **keys})
    assert answer.status == 400
    assert answer.json["error"]["type"] == "invalid_request_error"
    assert named in answer.json["error"]["message"]


def test_other_errors(server: Server) -> None:
    for answer, status, kind in (
        (server.post("/v1/messages", {**ASKED, "model": "x"}), 404, "not_found_error"),
        (server.post("/v1/messages/batches", ASKED), 404, "not_found_error"),
        (server.get("/v1/messages"), 405, "invalid_request_error"),
        (server.post("/v1/messages", b"{"), 400, "invalid_request_error"),
        (server.post("/v1/messages/count_tokens", {"model": "demo"}), 400, "invalid_request_error"),
    ):
        assert (answer.status, answer.json["type"]) == (status, "error")
        assert answer.json["error"]["type"] == kind


def test_tools_are_called_as_chosen(client: Any) -> None:
    """By a model that would not call them by itself."""
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 9}},
    }
    tools: Any = [
        {"name": name, "input_schema": {**schema, "required": ["n"]}} for name in ("one", "two")
    ]
    answer = client.messages.create(
        model="demo",
        messages=STORY,
        max_tokens=400,
        tools=tools,
        tool_choice={"type": "tool", "name": "two"},
    )
    (call,) = answer.content
    assert call.type == "tool_use"
    assert call.name == "two"
    assert isinstance(call.input["n"], int)
    assert answer.stop_reason == "tool_use"
    schema |= {"required": ["n"], "additionalProperties": False}
    config: Any = {"format": {"type": "json_schema", "schema": schema}}
    (block,) = client.messages.create(
        model="demo", messages=STORY, max_tokens=400, output_config=config
    ).content
    assert block.type == "text"
    assert set(json.loads(block.text)) == {"n"}


def test_pings_come_when_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm.services.http.streams.COMMENT_S", 0.0)
    monkeypatch.setattr("nanovllm.services.http.streams.LOOK_S", 0.01)

    def silent(message: Any, session: str) -> Iterator[Answer]:
        answers = writes("Hello.", 0, [])(message, session)
        yield from (answer for answer in answers if not isinstance(answer, Finish))

    with (
        ingress(silent) as double,
        serving(double.endpoint) as server,
        server.send("/v1/messages", {**ASKED, "stream": True}) as connection,
    ):
        received = b""
        while b'event: ping\ndata: {"type":"ping"}\n\n' not in received:
            more = connection.recv(4096)
            assert more
            received += more
