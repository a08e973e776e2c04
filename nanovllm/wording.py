"""Words for messages to people."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import msgspec


def counted(number: int, noun: str) -> str:
    """`1 request`, `2 requests`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known name that `name` is most like, or all of them."""
    names = sorted(known)
    if close := difflib.get_close_matches(name, names, n=1):
        return f"did you mean {close[0]}?"
    return f"there are {', '.join(names)}"


def key_and_reason(error: msgspec.ValidationError) -> tuple[str, str]:
    """Where msgspec found a mistake, and which: ("stop[1]", "Expected `str` of length >= 1")."""
    reason, _, where = str(error).partition(" - at `$.")
    return where.rstrip("`"), reason


def mistake(error: msgspec.ValidationError) -> str:
    """`key: reason` in one line, or the reason alone if it concerns no key."""
    return ": ".join(filter(None, key_and_reason(error)))
