"""Reading a person's files: what is wrong with one is told in a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from nanovllm.wording import mistake

T = TypeVar("T")


class InputFileError(ValueError):
    """A file cannot be read, or is not what it should be; the message names file and line."""


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputFileError(f"cannot read {path}: {error.strerror}") from None


def decoded(raw: bytes, kind: type[T], where: str) -> T:
    """JSON as `kind`. Raises InputFileError, which says `where` the mistake is."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise InputFileError(f"{where}: {mistake(error)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputFileError(f"{where}: no JSON: {error}") from None


def json_lines(raw: bytes, kind: type[T], path: Path) -> Iterator[tuple[int, T]]:
    """The number, from 1, and a `kind` of each line of `path`, whose bytes are `raw`, that is not
    empty."""
    for number, line in enumerate(raw.splitlines(), 1):
        if line.strip():
            yield number, decoded(line, kind, f"{path}, line {number}")
