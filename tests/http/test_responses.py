"""Responses, with the `openai` package as a client."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from nanovllm.protocol import Error, Finish
from tests.client.double import Answer, ingress
from tests.http.server import TIMEOUT_S, Server, serving
from tests.http.test_chat import ANSWER_AT, OUTPUT, writes

STORY = "Tell me a story."
WEATHER: Any = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
ASKED: dict[str, Any] = {"model": "demo", "input": "hello"}
IMAGE: Any = {"type": "input_image", "image_url": "data:"}
ARGUMENTS = '{"city": "Zürich"}'


@contextlib.contextmanager
def client_of(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with client_of(server) as client:
        yield client


def numbered(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    return events


def told(answer: Any) -> list[Any]:
    """What the items of a response say."""
    items: list[Any] = []
    for item in answer.output:
        if item.type == "function_call":
            items.append((item.name, item.arguments, item.status))
        else:
            (part,) = item.content
            items.append((part.type, part.text, item.status))
    return items


@pytest.mark.parametrize("cuts", [[], [ANSWER_AT], list(range(8, ANSWER_AT - 8, 3))])
def test_an_answer_is_told_apart(cuts: list[int]) -> None:
    with (
        ingress(writes(OUTPUT, ANSWER_AT, cuts)) as double,
        serving(double.endpoint) as server,
        client_of(server) as client,
    ):
        whole = client.responses.create(**ASKED, tools=[WEATHER])
        with client.responses.stream(**ASKED, tools=[WEATHER]) as stream:
            texts = [e.delta for e in stream if e.type == "response.output_text.delta"]
            streamed = stream.get_final_response()
    assert "".join(texts) == "I look.\n\nNow."
    for answer in (whole, streamed):
        assert told(answer) == [
            ("reasoning_text", "Hm.\n\nYes.", "completed"),
            ("output_text", "I look.\n\nNow.", "completed"),
            *[("weather", ARGUMENTS, "completed")] * 2,
        ]
        assert answer.status == "completed"
        assert answer.store is False
        assert answer.usage.total_tokens == 3
        assert len({item.call_id for item in answer.output[2:]}) == 2


def test_events_come_in_order() -> None:
    text = f"<think>\nHm\n</think>\nYes.{OUTPUT[-79:]}"
    at = text.index("\nYes")
    script = writes(text, at, [9, 10, at, at + 2, at + 60])
    with ingress(script) as double, serving(double.endpoint) as server:
        events = numbered(server.post("/v1/responses", {**ASKED, "stream": True}).events)
        with_tools = numbered(
            server.post("/v1/responses", {**ASKED, "tools": [WEATHER], "stream": True}).events
        )
    kinds = list(dict.fromkeys(event["type"].removeprefix("response.") for event in with_tools))
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("reasoning_text.delta", "reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_text.delta", "output_text.done"),
        *("function_call_arguments.delta", "function_call_arguments.done", "completed"),
    ]
    for stream in (events, with_tools):
        created, in_progress, *rest, completed = stream
        for event in (created, in_progress):
            assert event["response"]["status"] == "in_progress"
            assert event["response"]["output"] == []
        output = completed["response"]["output"]
        for index, item in enumerate(output):
            own = [event for event in rest if event["output_index"] == index]
            assert {e.get("item_id") or e["item"]["id"] for e in own} == {item["id"]}
            assert own[0]["item"]["status"] == "in_progress"
            assert own[-1]["item"] == item
            said = "".join(event.get("delta", "") for event in own)
            assert said == (
                item["arguments"] if "arguments" in item else item["content"][0]["text"]
            )
        assert [event["output_index"] for event in rest] == sorted(
            event["output_index"] for event in rest
        )
    assert json.loads(output[2]["arguments"])


def test_a_call_that_breaks_is_text_too() -> None:
    text = '<tool_call>{"name": "weather", "arguments": {"city": "Zü'
    with (
        ingress(writes(text, 0, [30, 50])) as double,
        serving(double.endpoint) as server,
        client_of(server) as client,
    ):
        whole = client.responses.create(**ASKED, tools=[WEATHER])
        with client.responses.stream(**ASKED, tools=[WEATHER]) as stream:
            kinds = [event.type for event in stream]
            streamed = stream.get_final_response()
        items = [{"role": "user", "content": "hello"}, *streamed.output]
        client.responses.create(model="demo", input=items)
        said = double.generates[-1].messages
    message = ("output_text", text, "completed")
    assert said == [
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": [{"type": "text", "text": text}]},
    ]
    assert told(whole) == [message]
    call, *rest = told(streamed)
    assert call[2] == "incomplete"
    with pytest.raises(ValueError):
        json.loads(call[1])
    assert rest == [message]
    assert "response.function_call_arguments.done" not in kinds


def test_a_response_says_what_the_chat_does(client: Any, server: Server) -> None:
    """With reasoning, and its tokens counted; the last item is incomplete where tokens end."""
    body = {"seed": 7, "max_tokens": 300, "temperature": 0.8}
    asked = {"seed": 7, "max_output_tokens": 300, "temperature": 0.8, "metadata": {"a": "b"}}
    chat = server.chat(messages=[{"role": "user", "content": STORY}], **body).json
    (choice,) = chat["choices"]
    answer = server.post("/v1/responses", {"model": "demo", "input": STORY, **asked}).json
    said = {item["type"]: item["content"][0]["text"] for item in answer["output"]}
    assert said.get("message", "") == choice["message"]["content"]
    assert said.get("reasoning") == choice["message"].get("reasoning_content")
    ends = {"stop": ("completed", None), "length": ("incomplete", {"reason": "max_output_tokens"})}
    assert (answer["status"], answer["incomplete_details"]) == ends[choice["finish_reason"]]
    usage = answer["usage"]
    assert usage["output_tokens"] == chat["usage"]["completion_tokens"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] <= usage["output_tokens"]
    assert answer["metadata"] == {"a": "b"}
    short = client.responses.create(model="demo", input=STORY, max_output_tokens=3, store=True)
    assert (short.status, short.output[-1].status) == ("incomplete", "incomplete")
    assert short.store is False
    without = client.responses.create(
        model="demo", input=STORY, max_output_tokens=3, reasoning={"effort": "none"}
    )
    assert [item.type for item in without.output] == ["message"]
    assert without.usage.output_tokens_details.reasoning_tokens == 0


def test_answers_are_of_their_format(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["n"],
        "additionalProperties": False,
    }
    asked: dict[str, Any] = {
        "model": "demo",
        "input": STORY,
        "max_output_tokens": 400,
        "reasoning": {"effort": "none"},
    }
    form = {"type": "json_schema", "name": "n", "schema": schema}
    answer = client.responses.create(**asked, text={"format": form})
    assert set(json.loads(answer.output_text)) == {"n"}
    tools = [{"type": "function", "name": name, "parameters": schema} for name in ("one", "two")]
    named = {"type": "function", "name": "two"}
    (call,) = client.responses.create(**asked, tools=tools, tool_choice=named).output
    assert (call.type, call.name) == ("function_call", "two")
    assert set(json.loads(call.arguments)) == {"n"}


def test_a_stream_that_fails_says_so() -> None:
    seen = threading.Event()

    def fails(message: Any, session: str) -> Iterator[Answer]:
        for answer in writes("Hello, world.", 0, [5])(message, session):
            if not isinstance(answer, Finish):
                yield answer
            else:
                assert seen.wait(TIMEOUT_S)
                yield Error(id=message.id, code="internal", message="it broke")

    events: list[Any] = []
    with (
        ingress(fails) as double,
        serving(double.endpoint) as server,
        client_of(server) as client,
    ):
        for event in client.responses.create(**ASKED, stream=True):
            events.append(event)
            seen.set()
    assert events[-1].type == "response.failed"
    assert events[-1].response.status == "failed"
    assert events[-1].response.error.message == "it broke"


def user(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": [*parts]}]


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id: is not served: responses are"),
        ({"conversation": "conv_1"}, "conversation: is not served: conversations are not kept"),
        ({"prompt": {"id": "x"}}, "prompt: is not served"),
        ({"background": True}, "background: only false"),
        ({"truncation": "auto"}, "truncation: is not served"),
        ({"include": ["message.output_text.logprobs"]}, "include[0]: is not served"),
        ({"top_logprobs": 2}, "top_logprobs: is not served"),
        ({"service_tier": "flex"}, "service_tier: is not served"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": user(IMAGE)}, "only text is served"),
        ({"input": [{"role": "user"}]}, "input[0]: content: missing"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "call_id: missing"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "leave it out"),
        (
            {
                "input": [
                    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"},
                    {"type": "function_call_output", "call_id": "1", "output": "x"},
                ]
            },
            "input[0]: arguments: this is not a JSON object",
        ),
        (
            {
                "input": [
                    {
                        "type": "function_call",
                        "call_id": "1",
                        "name": "f",
                        "arguments": "{",
                        "status": "incomplete",
                    }
                ]
            },
            "input: nothing but calls that are incomplete",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tool_choice": "required"}, "tool_choice: goes with tools only"),
        ({"tool_choice": "bot"}, "must be auto, none or required"),
        (
            {"tools": [WEATHER], "text": {"format": {"type": "json_object"}}},
            "text.format: beside tools only",
        ),
        ({"text": {"format": {"type": "yaml"}}}, "must be text, json_object or json_schema"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}},
            "text.f",
        ),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    server: Server, keys: dict[str, Any], named: str
) -> None:
    answer = server.post("/v1/responses", {**ASKED, **keys})
    assert answer.status == 400
    assert named in answer.json["error"]["message"]
    assert answer.json["error"]["param"]
