"""From the body of an HTTP request to a struct, or to an error that names the key to change."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import ClassVar, TypeVar

import msgspec

from nanovllm.services.http.errors import TOO_DEEP, ApiError
from nanovllm.wording import key_and_reason

KeysT = TypeVar("KeysT", bound="Keys")


class Keys(msgspec.Struct):
    """What an HTTP client asks: every key that we know, with its type and range.

    Unknown keys are ignored, as clients expect. A key that we know and do not serve has a type that
    leaves only what changes nothing (null, 0, …), so that the key is refused and never ignored.

    Attributes:
        not_served: the keys of that kind.
        hints: what to say of a key that is not served, or of an invalid value: by
            `messages[].role` of each `role`.
    """

    not_served: ClassVar[frozenset[str]] = frozenset()
    hints: ClassVar[Mapping[str, str]] = {}


def parse(body: bytes, kind: type[KeysT]) -> KeysT:
    """The request that `body` holds.

    Raises:
        ApiError: the body is not JSON, or a key is of the wrong type or out of range.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _refusal(kind, *key_and_reason(error)) from None
    except RecursionError:
        raise ApiError(400, TOO_DEEP) from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None


def one_of(values: Iterable[str]) -> str:
    """`must be a, b or c`."""
    *others, last = values
    return f"must be {', '.join(others)} or {last}"


def only(value: object, served: object, key: str) -> None:
    """Raises ApiError unless the value is null or the one that is served."""
    if value is not None and value != served:
        raise ApiError(400, f"{key}: only {msgspec.json.encode(served).decode()} is served", key)


def _refusal(kind: type[Keys], key: str, reason: str) -> ApiError:
    hint = kind.hints.get(re.sub(r"\[\d+]", "[]", key))
    if re.split(r"[.\[]", key)[0] in kind.not_served:
        reason = f"is not served: {hint or reason}"
    elif reason.startswith("Invalid") and hint:
        reason = f"{reason}; {hint}"
    elif found := re.search(r"required field `(\w+)`", reason):
        key, reason = ".".join(filter(None, (key, found[1]))), "missing"
    return ApiError(400, f"{key}: {reason}" if key else reason, key or None)
