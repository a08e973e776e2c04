"""The directory that holds a running pipeline's sockets: private, locked, and left empty."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from nanovllm.settings import SettingsError

LOCK = "launch.lock"


@contextlib.contextmanager
def runtime_dir(path: Path) -> Iterator[None]:
    """Holds the directory, mode 0700, until the block ends; then removes what the services left.

    What a killed pipeline left behind is removed at the start: the lock died with it.

    Raises:
        SettingsError: if another pipeline holds it, or it cannot be made private.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise SettingsError(f"--runtime-dir {path} belongs to another user; name another")
        path.chmod(0o700)
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
    for leftover in (*path.glob("*.sock"), *path.glob("*.sock.lock")):
        with contextlib.suppress(FileNotFoundError):
            leftover.unlink()
