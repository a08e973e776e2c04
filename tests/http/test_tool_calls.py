"""Tool calls in an answer's text, however it comes in pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanovllm.services.http.tool_calls import CLOSE, OPEN, ToolCall, ToolCallParser

WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'

values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.text()
    | st.just(f"a{OPEN}{CLOSE}"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(st.text(), values, max_size=4)
calls = st.tuples(st.text(min_size=1), arguments)
# What a model may write that looks much like a call.
SIGNS = ("<tool", "_call>", "<", "{", "}", "[", "]", '"', "\\", "\n", " ", "a", ":", ",", "\x01")
NAMED = ('{"name": "f", "arguments": {}}', '"name"', '"arguments"', "1e")
fragments = st.lists(st.sampled_from([OPEN, CLOSE, WEATHER, *SIGNS, *NAMED]), max_size=20).map(
    "".join
)


def parse(text: str, cuts: list[int]) -> tuple[str, list[ToolCall]]:
    """The content and the calls of `text`, fed in pieces that end at the `cuts`."""
    parser = ToolCallParser()
    bounds = sorted(cut % (len(text) + 1) for cut in cuts)
    found: list[str | ToolCall] = []
    for begin, end in zip([0, *bounds], [*bounds, len(text)], strict=True):
        found += parser.feed(text[begin:end])
    found += parser.rest()
    content = "".join(piece for piece in found if isinstance(piece, str))
    return content, [piece for piece in found if isinstance(piece, ToolCall)]


def written(name: str, values: dict[str, Any], ascii_only: bool) -> str:
    call = json.dumps({"name": name, "arguments": values}, ensure_ascii=ascii_only)
    return f"{OPEN}\n{call}\n{CLOSE}"


@given(fragments | st.text(), st.lists(st.integers(0, 400)))
@example('<tool_call>{"name": "f\\', [12, 19])
@example(WEATHER + "</tool", [70])
def test_pieces_are_found_as_in_the_whole(text: str, cuts: list[int]) -> None:
    assert parse(text, cuts) == parse(text, [])
    assert parse(text, list(range(len(text)))) == parse(text, [])


@given(st.text(st.characters(exclude_characters="<")), st.lists(calls, max_size=3), st.booleans())
def test_calls_are_found_whatever_their_arguments(
    before: str, made: list[tuple[str, dict[str, Any]]], ascii_only: bool
) -> None:
    text = "\n".join([before, *(written(*call, ascii_only) for call in made)])
    content, found = parse(text, list(range(0, len(text), 3)))
    assert content == (before.rstrip() if made else text)
    assert [(call.name, json.loads(call.arguments)) for call in found] == made


@given(fragments, st.lists(st.integers(0, 400)))
def test_arguments_are_objects_and_nothing_else_is_lost(text: str, cuts: list[int]) -> None:
    content, found = parse(text, cuts)
    for call in found:
        assert isinstance(json.loads(call.arguments), dict)
    if not found:
        assert content == text


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        ("none", "none", []),
        (WEATHER, "", ["weather"]),
        (f"Let me see.\n\n{WEATHER}\n{WEATHER}\n", "Let me see.", ["weather", "weather"]),
        (f"{WEATHER}\nThat is all.", "That is all.", ["weather"]),
        (WEATHER.removesuffix(f"\n{CLOSE}"), "", ["weather"]),
        (f"{OPEN} no JSON {CLOSE}", f"{OPEN} no JSON {CLOSE}", []),
        (f'{OPEN}{{"name": "f"}}{CLOSE}', "", ["f"]),
        (f'{OPEN}{{"name": 1}}{CLOSE}', f'{OPEN}{{"name": 1}}{CLOSE}', []),
        (
            f'{OPEN}{{"name": "f", "arguments": "x"}}',
            f'{OPEN}{{"name": "f", "arguments": "x"}}',
            [],
        ),
        (f'{OPEN}{{"name": "f", "argu', f'{OPEN}{{"name": "f", "argu', []),
        (f"{OPEN}{{broken {WEATHER}", f"{OPEN}{{broken", ["weather"]),
        (f"a <b> {OPEN[:5]}", f"a <b> {OPEN[:5]}", []),
    ],
)
def test_tool_calls_are_told_from_text(text: str, content: str, names: list[str]) -> None:
    found, calls = parse(text, list(range(len(text))))
    assert (found, [call.name for call in calls]) == (content, names)


def test_content_is_given_at_once() -> None:
    parser = ToolCallParser()
    assert parser.feed("Hello, ") == ["Hello,"]
    assert parser.feed("world") == [" world"]
    assert parser.feed("<to") == []
    assert parser.feed("ol>") == ["<tool>"]


@pytest.mark.parametrize("step", [4096, 10_000_000])
@pytest.mark.parametrize(
    "text",
    [
        (OPEN + '{"name": "f", "arguments": {"a": ["') * 40_000,
        OPEN + '{"name": "' + (OPEN + "{") * 100_000,
        OPEN + "{" * 1_000_000,
    ],
)
def test_text_that_keeps_beginning_calls_takes_linear_time(text: str, step: int) -> None:
    """A quadratic parser would not come to an end here within the test's time."""
    assert parse(text, list(range(0, len(text), step))) == (text, [])
