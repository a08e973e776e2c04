"""Reading a checkpoint's JSON files, and the error of a checkpoint at fault."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from nanovllm.wording import mistake

T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; the message says why in one line."""


def refuse_pointer(path: Path, begin: bytes) -> None:
    """Raises CheckpointError if the file that begins so is one that Git LFS left in its place."""
    if begin.startswith(b"version https://git-lfs.github.com/spec/"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in {path.parent}"
        )


def read_json(path: Path, kind: type[T], of_another_kind: str = "") -> T:
    """The content of `path`.

    Args:
        of_another_kind: what to say of JSON that is not of this kind, before the mistake.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file cannot be read, is not JSON, or is not of this kind.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    refuse_pointer(path, content)
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: {of_another_kind}{mistake(error)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
