"""A lock that ends with the process that holds it: on a file, which goes when the lock does."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def hold(path: Path | str) -> int:
    """Locks the file at `path`, which is made if there is none; the descriptor to `release`.

    Whoever opened the file before `release` removed it can still lock that file, though another
    process may hold the next file at `path`. So a lock counts only if its file is there.

    Raises:
        BlockingIOError: another process, or this one, holds the lock.
        OSError: the file cannot be made.
    """
    while True:
        held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, held):
                return held
        except BaseException:
            os.close(held)
            raise
        os.close(held)


def release(path: Path | str, held: int) -> None:
    """Removes the file at `path`, and ends the lock `held` on it."""
    if _is_at(path, held):
        os.unlink(path)
    os.close(held)


def _is_at(path: Path | str, held: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(held))
    except FileNotFoundError:
        return False
