"""Chats, Responses and Messages: the same conversation is the same prompt, drawn the same way."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanovllm.checkpoint import DEMO_CHECKPOINT
from nanovllm.checkpoint.chat_template import ChatTemplate
from nanovllm.checkpoint.tokenizer import read_chat_template
from nanovllm.checkpoint.tokenizer_config import TokenizerConfig
from nanovllm.client.results import Completion, Delta, Usage
from nanovllm.services.http.anthropic import requests as anthropic
from nanovllm.services.http.anthropic.messages import MessageOutput
from nanovllm.services.http.context import ServedModel
from nanovllm.services.http.conversation import Conversation
from nanovllm.services.http.openai import chat as openai_chat
from nanovllm.services.http.openai.requests import ChatRequest
from nanovllm.services.http.openai.responses import requests as responses
from nanovllm.services.http.openai.responses.responses import ResponseOutput
from nanovllm.services.http.parsing import parse
from nanovllm.services.http.streams import Output
from nanovllm.services.http.tool_calls import OPEN
from tests.http.server import Server
from tests.http.test_tool_calls import WEATHER, fragments

CONFIG = TokenizerConfig.from_checkpoint(DEMO_CHECKPOINT)
TEMPLATE = ChatTemplate(read_chat_template(DEMO_CHECKPOINT, CONFIG) or "", CONFIG.special_tokens())
MODEL = ServedModel.from_checkpoint(DEMO_CHECKPOINT, "demo", 4096)


class Call(NamedTuple):
    """A tool call, and what came of it."""

    id: str
    name: str
    arguments: dict[str, Any]
    result: str


class Turn(NamedTuple):
    """What the user says, and what the assistant answers; the last turn may have no answer."""

    asked: list[str]
    thought: str
    answer: str
    calls: list[Call]


class Talk(NamedTuple):
    system: str
    turns: list[Turn]
    tools: list[str]
    thinks: bool
    forced: bool


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
calls = st.builds(
    Call, words, words, st.dictionaries(words, values, max_size=2), st.text(max_size=9)
)
turns = st.builds(
    Turn,
    st.lists(words, min_size=1, max_size=2),
    st.just("") | words,
    words,
    st.lists(calls, max_size=2),
)
talks = st.builds(
    Talk,
    st.just("") | words,
    st.lists(turns, min_size=1, max_size=3),
    st.lists(words, max_size=2, unique=True),
    st.booleans(),
    st.booleans(),
)


def parameters(name: str) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {"type": "string"}}}


def as_chat(talk: Talk) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    if talk.system:
        messages.append({"role": "system", "content": talk.system})
    for turn in talk.turns:
        parts = [{"type": "text", "text": text} for text in turn.asked]
        messages.append({"role": "user", "content": parts})
        answer: dict[str, Any] = {"role": "assistant", "content": turn.answer}
        if turn.thought:
            answer["reasoning_content"] = turn.thought
        if turn.calls:
            answer["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
                }
                for call in turn.calls
            ]
        messages.append(answer)
        messages += [
            {"role": "tool", "tool_call_id": call.id, "content": call.result} for call in turn.calls
        ]
    tools = [
        {"type": "function", "function": {"name": name, "parameters": parameters(name)}}
        for name in talk.tools
    ]
    return {
        "messages": messages,
        "chat_template_kwargs": {"enable_thinking": talk.thinks},
        **({"tools": tools, "tool_choice": "required" if talk.forced else "auto"} if tools else {}),
    }


def as_responses(talk: Talk) -> dict[str, Any]:
    items: list[dict[str, Any]] = []
    for turn in talk.turns:
        parts = [{"type": "input_text", "text": text} for text in turn.asked]
        items.append({"type": "message", "role": "user", "content": parts})
        if turn.thought:
            thoughts = [{"type": "reasoning_text", "text": turn.thought}]
            items.append({"type": "reasoning", "id": "rs_1", "summary": [], "content": thoughts})
        output = [{"type": "output_text", "text": turn.answer, "annotations": []}]
        items.append({"type": "message", "id": "m", "role": "assistant", "content": output})
        items += [
            {
                "type": "function_call",
                "call_id": call.id,
                "name": call.name,
                "arguments": json.dumps(call.arguments),
            }
            for call in turn.calls
        ]
        items += [
            {"type": "function_call_output", "call_id": call.id, "output": call.result}
            for call in turn.calls
        ]
    tools = [
        {"type": "function", "name": name, "parameters": parameters(name)} for name in talk.tools
    ]
    return {
        "input": items,
        "instructions": talk.system,
        "reasoning": {"effort": "high" if talk.thinks else "none"},
        **({"tools": tools, "tool_choice": "required" if talk.forced else "auto"} if tools else {}),
    }


def as_messages(talk: Talk) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for turn in talk.turns:
        asked = [{"type": "text", "text": text} for text in turn.asked]
        if (
            messages
            and isinstance(messages[-1]["content"], list)
            and messages[-1]["role"] == "user"
        ):
            messages[-1]["content"] += asked  # behind the results of tools
        else:
            messages.append({"role": "user", "content": asked})
        blocks: list[dict[str, Any]] = []
        if turn.thought:
            blocks.append({"type": "thinking", "thinking": turn.thought, "signature": "x"})
        blocks.append({"type": "text", "text": turn.answer})
        blocks += [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments}
            for call in turn.calls
        ]
        messages.append({"role": "assistant", "content": blocks})
        results = [
            {"type": "tool_result", "tool_use_id": call.id, "content": call.result}
            for call in turn.calls
        ]
        if results:
            messages.append({"role": "user", "content": results})
    tools = [{"name": name, "input_schema": parameters(name)} for name in talk.tools]
    return {
        "messages": messages,
        "system": talk.system,
        "thinking": {"type": "adaptive" if talk.thinks else "disabled"},
        **(
            {"tools": tools, "tool_choice": {"type": "any" if talk.forced else "auto"}}
            if tools
            else {}
        ),
    }


def conversations(talk: Talk, **keys: Any) -> list[Conversation]:
    """The talk, as each dialect's requests are translated."""
    keys = {"model": "demo", **keys}
    chat = msgspec.json.encode({**keys, **as_chat(talk), "max_tokens": 9})
    response = msgspec.json.encode({**keys, **as_responses(talk), "max_output_tokens": 9})
    message = msgspec.json.encode({**keys, **as_messages(talk), "max_tokens": 9})
    return [
        openai_chat.conversation_of(parse(chat, ChatRequest), chat, MODEL),
        responses.conversation_of(parse(response, responses.ResponsesRequest), MODEL),
        anthropic.conversation_of(parse(message, anthropic.MessagesRequest), MODEL),
    ]


@given(talks)
def test_a_conversation_is_one_prompt(talk: Talk) -> None:
    chat, response, message = conversations(talk, temperature=0.5, top_p=0.9, seed=3, top_k=7)
    text = TEMPLATE.render(chat.chat)
    assert TEMPLATE.render(response.chat) == text
    assert TEMPLATE.render(message.chat) == text
    assert response.sampling == chat.sampling
    # The door itself cuts what ends a message.
    message.sampling.include_stop_str_in_output = False
    assert message.sampling == chat.sampling
    assert len({c.has_tools for c in (chat, response, message)}) == 1


def test_the_answers_are_alike(server: Server) -> None:
    """From the pipeline: their text, and how many tokens prompt and output have."""
    talk = Talk("Be kind.", [Turn(["Hello."], "", "Hi.", [])], [], False, False)
    keys = {"model": "demo", "seed": 5, "temperature": 0.7}
    question = {"role": "user", "content": "Tell me a story."}
    body = as_chat(talk)
    chat = server.chat(
        **{**body, **keys, "messages": [*body["messages"], question], "max_tokens": 60}
    ).json
    body = as_responses(talk)
    response = server.post(
        "/v1/responses",
        {**body, **keys, "input": [*body["input"], question], "max_output_tokens": 60},
    ).json
    body = as_messages(talk)
    message = server.post(
        "/v1/messages",
        {**body, **keys, "messages": [*body["messages"], question], "max_tokens": 60},
    ).json
    text = chat["choices"][0]["message"]["content"]
    assert response["output"][0]["content"][0]["text"] == text
    assert message["content"][0]["text"] == text
    usage = message["usage"]
    prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert {prompt, response["usage"]["input_tokens"]} == {chat["usage"]["prompt_tokens"]}
    assert {usage["output_tokens"], response["usage"]["output_tokens"]} == {
        chat["usage"]["completion_tokens"]
    }


class Said(NamedTuple):
    """What an answer says, in any dialect."""

    thought: str
    content: str
    calls: list[tuple[str, str]]


@given(fragments, st.integers(0, 400), st.lists(st.integers(0, 400), max_size=6), st.booleans())
@example(f'<think>a</think>b {OPEN}{{"name": "f", "arguments": {{"a": x', 16, [40], True)
@example(f"<think>a</think>b {WEATHER}{WEATHER} c", 16, [40, 99], False)
def test_any_output_says_the_same_in_all_dialects(
    text: str, answer_at: int, cuts: list[int], ends: bool
) -> None:
    """Whole and as a stream, whose blocks and items begin, grow and end one after another."""
    at = answer_at % (len(text) + 1)
    completion = Completion(text, [1], "stop" if ends else "length", Usage(1, 1, 0), None, None, at)
    bounds = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    deltas = [
        Delta(text[a:b], [1], None, at - a if a <= at < b or (at == b == len(text)) else None)
        for a, b in pairwise(bounds)
    ] or [Delta("", [1], None, 0)]
    talk = Talk("", [Turn(["a"], "", "b", [])], ["f"], True, False)
    _, response, message = conversations(talk)
    chat = openai_chat.ChatOutput(0, MODEL, tools=True).whole(completion).message
    said = Said(
        chat.reasoning_content or "",
        chat.content or "",
        [(str(c.function.name), str(c.function.arguments)) for c in chat.tool_calls or ()],
    )
    body = msgspec.json.encode({"model": "demo", **as_responses(talk)})
    ask = parse(body, responses.ResponsesRequest)
    whole_response = ResponseOutput(ask, MODEL, response).whole(completion)
    assert said_by_response(plain(whole_response)["output"]) == said
    whole_message = MessageOutput(MODEL, message, shows_thinking=True).whole(completion)
    assert said_by_message(plain(whole_message)["content"]) == said
    events = streamed(ResponseOutput(ask, MODEL, response), deltas, completion)
    assert said_by_response(items_of(events)) == said
    assert items_of(events) == events[-1]["response"]["output"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    events = streamed(MessageOutput(MODEL, message, shows_thinking=True), deltas, completion)
    assert said_by_message(blocks_of(events)) == said


def plain(struct: msgspec.Struct) -> Any:
    return msgspec.json.decode(msgspec.json.encode(struct))


def streamed(output: Output, deltas: list[Delta], completion: Completion) -> list[Any]:
    """Each event, as it was when it was made."""
    events = [plain(event) for event in output.begin()]
    for delta in deltas:
        events += [plain(event) for event in output.news(delta)]
    return events + [plain(event) for event in output.end(completion)]


def said_by_response(items: list[Any]) -> Said:
    texts = {"reasoning": "", "message": ""}
    calls = []
    for item in items:
        if item["type"] == "function_call":
            if item["status"] == "completed":
                calls.append((item["name"], item["arguments"]))
            else:
                with pytest.raises(ValueError):
                    json.loads(item["arguments"])
        else:
            texts[item["type"]] += item["content"][0]["text"]
    return Said(texts["reasoning"], texts["message"], calls)


def said_by_message(blocks: list[Any]) -> Said:
    return Said(
        "".join(block["thinking"] for block in blocks if block["type"] == "thinking"),
        "".join(block["text"] for block in blocks if block["type"] == "text"),
        [
            (block["name"], block.get("written") or json.dumps(block["input"]))
            for block in blocks
            if block["type"] == "tool_use"
        ],
    )


def items_of(events: list[Any]) -> list[Any]:
    """The items that are done, each of which has grown to what it is."""
    items: list[Any] = []
    grown = ""
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            grown = ""
        elif kind.endswith(".delta"):
            assert event["delta"]
            grown += event["delta"]
        elif kind == "output_item.done":
            item = event["item"]
            assert event["output_index"] == len(items)
            assert grown == (item["arguments"] if "name" in item else item["content"][0]["text"])
            items.append(item)
    return items


def blocks_of(events: list[Any]) -> list[Any]:
    """The blocks, joined from what has come of them."""
    blocks: list[Any] = []
    is_open = False
    for event in events:
        if event["type"] == "content_block_start":
            assert not is_open
            assert event["index"] == len(blocks)
            blocks.append({**event["content_block"], "written": ""})
        elif event["type"] == "content_block_delta":
            assert is_open
            assert event["index"] == len(blocks) - 1
            delta = dict(event["delta"])
            key = {"partial_json": "written"}
            for name in delta.keys() - {"type"}:
                blocks[-1][key.get(name, name)] += delta[name]
        is_open = event["type"].startswith("content_block_") and not event["type"].endswith("stop")
    return blocks


# What is wrong in any place of a body.
ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 2**70, 1e300, "", "x" * 100_000, [], [None], [[]], {}, {"": {}}),
    *({"type": "text"}, {"type": 3}, [{"type": "image"}], [{"role": "user"}]),
)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/messages/count_tokens"])
def test_odd_requests_are_answered_or_refused(server: Server, path: str) -> None:
    """With any value in any place: never by an error of the server's own."""
    call = Call("1", "f", {"a": [1]}, "x")
    talk = Talk(
        "s", [Turn(["a", "b"], "t", "c", [call]), Turn(["d"], "", "e", [])], ["f"], True, True
    )
    body = as_responses(talk) if path == "/v1/responses" else as_messages(talk)
    body |= {"model": "demo", "stream": False, "metadata": {"a": "b"}, "stop_sequences": ["x"]}
    body |= {"max_tokens": 1, "max_output_tokens": 1, "text": {"format": {"type": "text"}}}
    answers: dict[int, int] = {}
    for place in places(body):
        for odd in ODD:
            changed = json.loads(json.dumps(body))
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = odd
            answer = server.post(path, changed)
            answers[answer.status] = answers.get(answer.status, 0) + 1
            assert answer.status in (200, 400, 404), (place, odd, answer.body[:300])
            if answer.status != 200:
                assert answer.json["error"]["message"]
    assert answers[400] > answers[200] > 0, answers


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", b'{"messages": [{"role": "assistant", "content": [%s]}], "max_tokens": 1'),
        ("/v1/messages/count_tokens", b'{"messages": [{"role": "assistant", "content": [%s]}]'),
        ("/v1/responses", b'{"input": "x", "tools": [%s], "max_output_tokens": 1'),
    ],
)
def test_bodies_that_nest_as_deeply_as_can_be_read_are_refused(
    server: Server, path: str, body: bytes
) -> None:
    """A little less deeply they can be read, and not be written again."""
    nesting = b'{"type": "tool_use", "id": "1", "name": "f", "input": {"a": %s}}'
    if path == "/v1/responses":
        nesting = b'{"type": "function", "name": "f", "parameters": {"a": %s}}'
    statuses = set[int]()
    for depth in range(930, 1010):
        nested = body % (nesting % (b"[" * depth + b"]" * depth))
        statuses.add(server.post(path, nested + b', "model": "demo"}').status)
    assert 500 not in statuses
    assert 400 in statuses


def places(value: Any) -> list[list[Any]]:
    """The path of each key and each index in a value."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [[key, *rest] for key, its in inner for rest in ([], *places(its))]
