"""Python values as the built-in types that a message can hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

_PLAIN = {int, str, float, bool, type(None)}


def plain(value: Any) -> Any:
    """The value in built-in types.

    Numbers and strings of subclasses, scalars and arrays (of numpy, torch and the like) become what
    they hold; mappings and structs become dicts, other iterables lists. Anything else is returned
    as it is.
    """
    if type(value) in _PLAIN or (type(value) is list and _PLAIN.issuperset(map(type, value))):
        return value
    if callable(tolist := getattr(value, "tolist", None)):
        held = tolist()
        return held if type(held) is type(value) else plain(held)
    if isinstance(value, str):  # str() would give an enum's name
        return str.__str__(value)
    if isinstance(value, int):
        return int.__index__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, bytes | bytearray | memoryview):
        return [item if type(item) in _PLAIN else plain(item) for item in value]
    return value
