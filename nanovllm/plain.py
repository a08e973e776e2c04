"""Python values as the built-in types that a message can hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

_PLAIN = {int, str, float, bool, type(None)}
TOO_DEEP = "nested too deeply"


def plain(value: Any) -> Any:
    """The value in built-in types; lists and dicts are new ones.

    Numbers and strings of subclasses, scalars and arrays (of numpy, torch and the like) become what
    they hold; mappings and structs become dicts, other iterables lists. Anything else is returned
    as it is.

    Raises ValueError if the value is nested too deeply, or holds itself.
    """
    try:
        return _plain(value)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def sendable(name: str, value: Any) -> Any:
    """The value of this parameter in built-in types. Raises ValueError, which names the parameter,
    if the value cannot be made plain, or cannot be sent."""
    try:
        held = plain(value)
        if isinstance(held, str | list | dict):
            check_sendable(held)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
    return held


def check_sendable(value: Any) -> None:
    """Raises ValueError if a value of built-in types cannot be sent: its text is not valid Unicode,
    one of its integers has more than 64 bits, or it is nested too deeply."""
    try:
        msgspec.msgpack.encode(value)
    except UnicodeEncodeError as error:
        found = error.object[error.start]
        raise ValueError(f"the text is not valid Unicode (UTF-8): it holds {found!r}") from None
    except OverflowError:
        raise ValueError("an integer has more than 64 bits") from None
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def _plain(value: Any) -> Any:
    if type(value) in _PLAIN:
        return value
    if type(value) is list and _PLAIN.issuperset(map(type, value)):  # token ids, most often
        return value.copy()
    if callable(tolist := getattr(value, "tolist", None)):
        held = tolist()
        return held if type(held) is type(value) else _plain(held)
    if isinstance(value, str):  # str() would give an enum's name
        return str.__str__(value)
    if isinstance(value, int):
        return int.__index__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, bytes | bytearray | memoryview):
        return [item if type(item) in _PLAIN else _plain(item) for item in value]
    return value
