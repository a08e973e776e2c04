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
NAMED = (
    '{"name": "f", "arguments": {',
    '{"name": "f", "arguments": {}}',
    '"name"',
    '"arguments"',
    "1e",
)
fragments = st.lists(st.sampled_from([OPEN, CLOSE, WEATHER, *SIGNS, *NAMED]), max_size=20).map(
    "".join
)


def pieces(text: str, cuts: list[int]) -> list[str | ToolCall]:
    """What is found in `text`, fed in pieces that end at the `cuts`."""
    parser = ToolCallParser()
    bounds = sorted(cut % (len(text) + 1) for cut in cuts)
    found: list[str | ToolCall] = []
    for begin, end in zip([0, *bounds], [*bounds, len(text)], strict=True):
        found += parser.feed(text[begin:end])
    return found + parser.rest()


def joined(found: list[str | ToolCall]) -> tuple[str, list[ToolCall]]:
    """The content, and the calls as a client joins them, the incomplete ones too."""
    calls: list[ToolCall] = []
    for piece in found:
        if isinstance(piece, ToolCall):
            if piece.name is None:
                begun = calls.pop()
                assert not begun.complete
                piece = ToolCall(begun.name, begun.arguments + piece.arguments, piece.complete)
            calls.append(piece)
    return "".join(piece for piece in found if isinstance(piece, str)), calls


def parse(text: str, cuts: list[int]) -> tuple[str, list[ToolCall]]:
    """The content and the complete calls."""
    content, calls = joined(pieces(text, cuts))
    return content, [call for call in calls if call.complete]


def written(name: str, values: dict[str, Any], ascii_only: bool) -> str:
    call = json.dumps({"name": name, "arguments": values}, ensure_ascii=ascii_only)
    return f"{OPEN}\n{call}\n{CLOSE}"


@given(fragments | st.text(), st.lists(st.integers(0, 400)))
@example('<tool_call>{"name": "f\\', [12, 19])
@example(WEATHER + "</tool", [70])
def test_pieces_are_found_as_in_the_whole(text: str, cuts: list[int]) -> None:
    whole = joined(pieces(text, []))
    assert joined(pieces(text, cuts)) == whole
    assert joined(pieces(text, list(range(len(text))))) == whole


@given(st.text(st.characters(exclude_characters="<")), st.lists(calls, max_size=3), st.booleans())
def test_calls_are_found_whatever_their_arguments(
    before: str, made: list[tuple[str, dict[str, Any]]], ascii_only: bool
) -> None:
    text = "\n".join([before, *(written(*call, ascii_only) for call in made)])
    content, found = parse(text, list(range(0, len(text), 3)))
    assert content == (before.rstrip() if made else text)
    assert [(call.name, json.loads(call.arguments)) for call in found] == made


@given(st.text(min_size=1), arguments, st.booleans())
def test_arguments_come_as_they_are_written(
    name: str, values: dict[str, Any], ascii_only: bool
) -> None:
    """However long a string of theirs is."""
    text = written(name, {**values, "text": "x" * 50}, ascii_only)
    found = [piece for piece in pieces(text, list(range(len(text)))) if isinstance(piece, ToolCall)]
    assert found[0] == ToolCall(name, "", complete=False)
    assert len(found) > 50
    assert [piece.name for piece in found[1:]] == [None] * (len(found) - 1)
    assert [piece.complete for piece in found] == [False] * (len(found) - 1) + [True]


@given(fragments, st.lists(st.integers(0, 400)))
def test_arguments_of_what_is_no_call_never_become_json(text: str, cuts: list[int]) -> None:
    """A program that runs what it can parse runs no call that has no end."""
    for call in joined(pieces(text, cuts))[1]:
        if not call.complete:
            with pytest.raises(ValueError):
                json.loads(call.arguments)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (f'{OPEN}{{"name": "f", "arguments": {{"a": Bern}}}}{CLOSE}', '{"a": '),
        (f'{OPEN}{{"name": "f", "arguments": {{"a": "Be', '{"a": "Be'),
        (f'{OPEN}{{"name": "f", "arguments": {{"a": "\\ud800"}}}}{CLOSE}', '{"a": "\\ud800"'),
        (f'{OPEN}{{"name": "f", "arguments": {{}}, "arguments": {{"a": 1}}}}{CLOSE}', "{"),
        (f'{OPEN}{{"name": "f", "arguments": {{}}]', "{"),
    ],
)
def test_a_call_that_breaks_is_content_too(text: str, arguments: str) -> None:
    content, (call,) = joined(pieces(text, list(range(len(text)))))
    assert content == text
    assert call == ToolCall("f", arguments, complete=False)


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
