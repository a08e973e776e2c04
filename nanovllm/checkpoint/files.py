"""Reading a checkpoint's JSON files, and the error of a checkpoint at fault."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from nanovllm.wording import mistake

T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; the message says why in one line."""


def read_json(path: Path, kind: type[T]) -> T:
    """The content of `path`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is not JSON, or not of this kind.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: {mistake(error)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
