"""Structured outputs and tool calls that must come, over HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import openai
import pytest

from nanovllm.checkpoint import DEMO_CHECKPOINT
from nanovllm.checkpoint.generation import SamplingDefaults
from nanovllm.grammars import GrammarError, Grammars
from nanovllm.services.http.context import ServedModel
from nanovllm.services.http.openai.chat import conversation_of
from nanovllm.services.http.openai.requests import ChatRequest
from nanovllm.services.http.parsing import parse
from nanovllm.vocabulary import Vocabulary
from tests.http.server import Server

NO_THOUGHTS: Any = {Vocabulary.from_checkpoint(DEMO_CHECKPOINT).added["<think>"]: -100}
STORY: list[Any] = [{"role": "user", "content": "Tell me a story."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "who", "schema": SCHEMA, "strict": True}}
UNSUPPORTED = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {}}}}


def tool(name: str, parameters: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **keys}}


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **keys: Any) -> Any:
    """At this temperature the model would not end to think."""
    values = {"model": "demo", "messages": STORY, "temperature": 1.5, "max_tokens": 300, **keys}
    return client.chat.completions.create(**values, logit_bias=NO_THOUGHTS)


def test_answers_are_of_their_format(client: openai.OpenAI) -> None:
    for seed in range(4):
        (choice,) = ask(client, response_format=FORMAT, seed=seed).choices
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    (choice,) = ask(client, extra_body={"structured_outputs": {"json": SCHEMA}}, seed=0).choices
    (same,) = ask(client, extra_body={"guided_json": json.dumps(SCHEMA)}, seed=0).choices
    assert same.message.content == choice.message.content
    answers = [
        ask(client, extra_body=keys).choices[0].message.content
        for keys in (
            {"guided_regex": "[a-z]{3}[0-9]"},
            {"structured_outputs": {"regex": "[a-z]{3}[0-9]"}},
            {"guided_choice": ["fox", "hare"]},
            {"guided_grammar": 'start: "a" "b" | "c"'},
        )
    ]
    assert all(re.fullmatch("[a-z]{3}[0-9]", answer) for answer in answers[:2])
    assert answers[2] in ("fox", "hare")
    assert answers[3] in ("ab", "c")
    (whole,) = ask(client, response_format={"type": "json_object"}).choices
    assert whole.message.content.startswith("{")
    text = client.completions.create(
        model="demo", prompt="Once", max_tokens=9, extra_body={"guided_choice": ["a fox"]}
    )
    assert text.choices[0].text == "a fox"


def test_a_chat_without_thinking_has_none(client: openai.OpenAI) -> None:
    """The model would begin with `<think>` rather than with a bracket."""
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    (choice,) = client.chat.completions.create(
        model="demo",
        messages=STORY,
        temperature=0,
        max_tokens=300,
        response_format=FORMAT,
        extra_body=off,
    ).choices
    jsonschema.validate(json.loads(choice.message.content), SCHEMA)


def test_a_stream_is_of_its_format(client: openai.OpenAI) -> None:
    chunks = list(ask(client, response_format=FORMAT, stream=True, seed=3))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize(
    ("choice", "most"),
    [("required", 99), ({"type": "function", "function": {"name": "who"}}, 1)],
)
def test_tool_calls_that_must_come_do(client: openai.OpenAI, choice: Any, most: int) -> None:
    tools = [tool("who", SCHEMA), tool("bell")]
    for seed in range(3):
        keys: dict[str, Any] = {"tools": tools, "tool_choice": choice, "seed": seed}
        (answer,) = ask(client, **keys).choices
        if answer.finish_reason == "length":
            continue
        assert answer.finish_reason == "tool_calls"
        assert not answer.message.content
        assert 1 <= len(answer.message.tool_calls) <= most
        for call in answer.message.tool_calls:
            arguments = json.loads(call.function.arguments)
            if call.function.name == "who":
                jsonschema.validate(arguments, SCHEMA)
            else:
                assert call.function.name == "bell" != choice
                assert isinstance(arguments, dict)
    one = ask(client, tools=tools[:1], tool_choice="required", parallel_tool_calls=False)
    assert one.choices[0].finish_reason == "length" or len(one.choices[0].message.tool_calls) == 1
    streamed = list(ask(client, tools=tools[:1], tool_choice="required", stream=True, seed=1))
    calls = [call for chunk in streamed for call in chunk.choices[0].delta.tool_calls or ()]
    assert calls[0].function.name == "who"


def takes(text: str, **keys: Any) -> bool:
    """Whether the model may write such a text, and end there."""
    body = json.dumps({"model": "m", "messages": STORY, **keys}).encode()
    model = ServedModel("m", Path(), 4096, SamplingDefaults(), {}, frozenset(), None)
    outputs = conversation_of(parse(body, ChatRequest), body, model).sampling.structured_outputs
    assert outputs is not None
    grammars = grammars_of_bytes()
    try:
        grammars.matcher(outputs, None, [*text.encode(), 256])
    except GrammarError:
        return False
    return True


def grammars_of_bytes() -> Grammars:
    return Grammars({i: bytes([i]) for i in range(256)}, {256: b"<end>"}, [256], 257)


CALL = '<tool_call>\n{"name": "who", "arguments": {"name": "a", "age": 3}}\n</tool_call>'
WRONG = '<tool_call>\n{"name": "who", "arguments": {"name": "a", "age": "3"}}\n</tool_call>'
BELL = '<tool_call>\n{"name": "bell", "arguments": {}}\n</tool_call>'


def test_what_strict_and_forced_tools_allow() -> None:
    strict: dict[str, Any] = {"tools": [tool("who", SCHEMA, strict=True), tool("bell")]}
    for text in ("", "a <tool text", CALL, f"first {CALL}\n{BELL} last", f"{CALL}{CALL}"):
        assert takes(text, **strict), text
    for text in (WRONG, f"a {WRONG}", "<tool_call>", "<tool_call>\nfox", f"{CALL} {WRONG}"):
        assert not takes(text, **strict), text
    one = {**strict, "parallel_tool_calls": False}
    assert takes(f"first {CALL}", **one)
    assert takes("text", **one)
    assert not takes(f"{CALL}{BELL}", **one)
    forced = {**strict, "tool_choice": "required"}
    assert takes(f"{CALL}\n{BELL}", **forced)
    assert not takes(f"text {CALL}", **forced)
    assert not takes("", **forced)
    named = {**strict, "tool_choice": {"type": "function", "function": {"name": "bell"}}}
    assert takes(BELL, **named)
    assert not takes(CALL, **named)
    # White space ends.
    assert takes(BELL.replace("{}", "{" + "\n" * 32 + "}"), **forced)
    assert not takes(BELL.replace("{}", "{" + "\n" * 33 + "}"), **forced)
    # References are to the root of the parameters.
    defined = {"properties": {"x": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"const": 1}}}
    tools = [tool("bell", {**defined, "required": ["x"]}, strict=True)]
    assert takes(BELL.replace("{}", '{"x": 1}'), tools=tools)
    assert not takes(BELL, tools=tools)
    # What of a schema is not supported is ignored, unless the tool is strict.
    tools = [tool("bell", {"not": {"type": "string"}})]
    assert takes(BELL, tools=tools, tool_choice="required")
    tools = [tool("bell", {"not": {"type": "string"}}, strict=True)]
    assert not takes(BELL, tools=tools)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "not",
        ),
        ({"response_format": FORMAT, "extra_body": {"guided_regex": "a"}}, "response_format"),
        (
            {"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}},
            "structured_outputs: the answer can be only one",
        ),
        ({"extra_body": {"structured_outputs": {"structural_tag": "x"}}}, "structural_tag"),
        ({"extra_body": {"guided_regex": "(?=a)"}}, "look-ahead"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {
                "tools": [tool("a")],
                "tool_choice": {"type": "function", "function": {"name": "b"}},
            },
            "tool_choice",
        ),
        (
            {"tools": [tool("a", strict=True), tool("b", {"not": {}}, strict=True)]},
            r"tools: the parameters of tools\[1\]: Unimplemented keys: \[\"not\"\]",
        ),
        (
            {
                "tools": [tool("a"), tool("b"), tool("c", {"not": {}}, strict=True)],
                "tool_choice": {"type": "function", "function": {"name": "c"}},
            },
            r"tools\[2\]: Unimplemented",
        ),
        ({"tools": [tool("a", {"type": "string"})], "tool_choice": "required"}, "type must be obj"),
        (
            {"tools": [tool("a")], "tool_choice": "required", "response_format": FORMAT},
            "response_format",
        ),
        ({"response_format": FORMAT, "extra_body": {"ignore_eos": True}}, "ignore_eos"),
        ({"extra_body": {"guided_choice": ["a"], "min_tokens": 9}}, "400 - after 1 .* no token"),
    ],
)
def test_what_cannot_be_served_is_refused(
    client: openai.OpenAI, keys: dict[str, Any], named: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=named):
        ask(client, **keys)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}),
        ("structured_outputs", {"regex": "("}),
        ("guided_json", ""),
        ("guided_json", "no JSON"),
        ("guided_grammar", "no grammar"),
        ("tools", [tool("a", {"not": {}}, strict=True)]),
        ("ignore_eos", True),
    ],
)
def test_a_refusal_names_the_key_that_was_sent(
    client: openai.OpenAI, key: str, value: object
) -> None:
    keys = {key: value} if key != "ignore_eos" else {key: value, "guided_regex": "a"}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=f"{key}: ") as refused:
            ask(client, extra_body={**keys, "stream": stream})
        assert refused.value.param == key
