"""What can go wrong between a program and a pipeline."""

from __future__ import annotations

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
