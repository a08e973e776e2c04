"""The directory that holds a running pipeline's sockets: private, locked, and left empty."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from nanovllm.settings import SettingsError, SocketName

LOCK = "launch.lock"


@contextlib.contextmanager
def runtime_dir(path: Path) -> Iterator[None]:
    """Holds the directory until the block ends; then removes what the services left, and it too
    if nothing else is there. It is made, mode 0700, where there is none.

    What a killed pipeline left behind is removed at the start: the lock died with it.

    Raises:
        SettingsError: if another pipeline holds it, it is not private, or it cannot be used.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
        if found.st_uid != os.getuid():
            raise SettingsError(f"--runtime-dir {path} belongs to another user; name another")
        if found.st_mode & 0o077:
            raise SettingsError(
                f"--runtime-dir {path} is open to other users; name another, or chmod 700 it"
            )
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingsError(f"--runtime-dir {path} cannot be used: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise SettingsError(
            f"--runtime-dir {path} is in use by another running pipeline; stop it or name another"
        ) from None
    try:
        _clear(path)
        yield
    finally:
        _clear(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path / LOCK)
        os.close(lock)
        with contextlib.suppress(OSError):  # not empty: something that is not ours
            path.rmdir()


def _clear(path: Path) -> None:
    for name in get_args(SocketName):
        for leftover in (path / f"{name}.sock", path / f"{name}.sock.lock"):
            leftover.unlink(missing_ok=True)
