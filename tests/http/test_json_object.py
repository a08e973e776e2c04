"""JSON as it comes, against the decoder."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from nanovllm.services.http.json_object import JsonObjectReader

values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(-1e300, 1e300) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
objects = st.dictionaries(st.text(), values, max_size=4)
SIGNS = ('"', "\\", "{", "}", "[", "]", ":", ",", " ", "1", "-", ".", "e", "true", "u00", "\n", "é")


def read(text: str, size: int) -> tuple[JsonObjectReader, int]:
    """A reader that was given the text in pieces of this size, and where it came to."""
    reader, at = JsonObjectReader(), 0
    for end in range(size, len(text) + size, size):
        while not (reader.ended or reader.broken):
            reached = reader.read(text[:end], at)
            if reached == at:
                break
            at = reached
    return reader, at


@given(objects, st.booleans(), st.sampled_from([None, 1]), st.integers(1, 9), st.text())
def test_objects_end_where_they_end(
    value: dict[str, Any], ascii_only: bool, indent: int | None, size: int, behind: str
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    reader, at = read(text + behind, size)
    assert reader.ended
    assert at == len(text)
    for end in range(len(text)):
        reader, _ = read(text[:end], size)
        assert (reader.ended, reader.broken) == (False, False)


@given(st.lists(st.sampled_from(SIGNS)).map("".join), st.integers(1, 3), objects)
@example("e", 1, {"": 100309})
def test_what_it_refuses_is_no_json(signs: str, size: int, value: dict[str, Any]) -> None:
    """And what it lets pass is."""
    whole = json.dumps(value, ensure_ascii=False)  # no half of a surrogate pair
    for text in (signs, "{" + signs, whole[: len(whole) // 2] + signs + whole[len(whole) // 2 :]):
        reader, at = read(text, size)
        if is_object(text[:at]) is False:
            assert not reader.ended
        if is_object(text):
            assert reader.ended
            assert not text[at:].strip()


def is_object(text: str) -> bool | None:
    """Whether the text is a JSON object; None where msgspec refuses a number such as 1e309 before
    it has read the rest."""
    try:
        msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        return None if "out of range" in str(error) else False
    return True
