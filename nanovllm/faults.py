"""For tests only: a service that crashes when it meets a chosen token.

With `NANOVLLM_FAULT=gpu_worker:123` every gpu_worker, and with `tokenizer:123` every tokenizer,
ends by SIGABRT when token 123 is in a prompt that it is to compute, or has encoded.
"""

from __future__ import annotations

import os

from nanovllm.messages import unpack

VARIABLE = "NANOVLLM_FAULT"


def fault(role: str) -> int | None:
    """The token that services of this role are to crash on; None: on no token.

    Raises ValueError if the variable makes no sense.
    """
    value = os.environ.get(VARIABLE)
    if value is None:
        return None
    who, _, token = value.partition(":")
    return int(token) if who == role else None


def crash_on(token: int, tokens: bytes) -> None:
    """Ends this process, as a bug in native code would, if `token` is among `tokens` (int32)."""
    if token in unpack(tokens):
        os.abort()
