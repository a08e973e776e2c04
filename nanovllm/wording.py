"""What messages to people have in common."""

from __future__ import annotations

import msgspec


def counted(number: int, noun: str) -> str:
    """`1 request`, `2 requests`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def key_and_reason(error: msgspec.ValidationError) -> tuple[str, str]:
    """What msgspec found wrong, and where: ("stop[1]", "Expected `str` of length >= 1")."""
    reason, _, where = str(error).partition(" - at `$.")
    return where.rstrip("`"), reason


def mistake(error: msgspec.ValidationError) -> str:
    """The same in one line; what concerns no key in particular is the reason alone."""
    return ": ".join(filter(None, key_and_reason(error)))
