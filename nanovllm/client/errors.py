"""What can go wrong between a program and a pipeline."""

from __future__ import annotations

import msgspec

from nanovllm.protocol import ErrorCode


class RequestError(Exception):
    """The pipeline refused or gave up one request.

    Attributes:
        code: one of the protocol's: `invalid_request`, `context_length_exceeded`, `duplicate_id`,
            `overloaded`, `poisoned`, `internal`.
        message: what was wrong, in words.
    """

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class PipelineUnavailable(ConnectionError):
    """No pipeline answers at the endpoint."""


def key_and_reason(error: msgspec.ValidationError) -> tuple[str, str]:
    """What msgspec found wrong, and where: ("stop[1]", "Expected `str` of length >= 1")."""
    reason, _, where = str(error).partition(" - at `$.")
    return where.rstrip("`"), reason


def mistake(error: msgspec.ValidationError) -> str:
    """The same in one line; what concerns no key in particular is the reason alone."""
    return ": ".join(filter(None, key_and_reason(error)))
