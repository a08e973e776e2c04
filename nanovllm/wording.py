"""Words for messages to people."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

import msgspec

_WHERE = re.compile(r"(.*) - at (`key` in )?`\$\.(.*)`", re.DOTALL)


def counted(number: int, noun: str) -> str:
    """`1 request`, `2 requests`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known name that `name` is most like, or all of them."""
    names = sorted(known)
    if close := difflib.get_close_matches(name, names, n=1):
        return f"did you mean {close[0]}?"
    return f"there are {', '.join(names)}"


def key_and_reason(error: Exception | str) -> tuple[str, str]:
    """Where msgspec found a mistake, and which: ("stop[1]", "Expected `str` of length >= 1"). The
    mistake may be a key of a map, whose values are "…[...]" to msgspec."""
    found = _WHERE.fullmatch(str(error))
    if found is None:
        return "", str(error)
    reason, is_key, where = found.groups()
    return where.removesuffix("[...]"), f"a key: {reason}" if is_key else reason


def mistake(error: msgspec.ValidationError) -> str:
    """`key: reason` in one line, or the reason alone if it concerns no key."""
    return ": ".join(filter(None, key_and_reason(error)))
