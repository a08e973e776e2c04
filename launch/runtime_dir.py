"""The directory of a running pipeline's sockets: private, and locked by the launcher."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from nanovllm.file_lock import hold, release
from nanovllm.settings import SOCKETS, SettingsError

LOCK = "launch.lock"


@contextlib.contextmanager
def runtime_dir(path: Path) -> Iterator[None]:
    """Makes the directory (mode 0700) if there is none, and locks it until the block ends.

    The sockets in it are removed at the end, and at the start those of a pipeline that was killed:
    the lock of a process ends with the process. An empty directory is removed too.

    Raises:
        SettingsError: another pipeline holds the directory, or the directory is not private or
            cannot be used.
    """
    try:
        lock = _hold(path)
    except BlockingIOError:
        raise SettingsError(
            f"--runtime-dir {path} is in use by another running pipeline; stop it or name another"
        ) from None
    except OSError as error:
        raise SettingsError(f"--runtime-dir {path} cannot be used: {error.strerror}") from None
    try:
        _clear(path)
        yield
    finally:
        _clear(path)
        release(path / LOCK, lock)
        with contextlib.suppress(OSError):  # not empty: other files are there
            path.rmdir()


def _hold(path: Path) -> int:
    while True:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            found = path.stat()
            if found.st_uid != os.getuid():
                raise SettingsError(f"--runtime-dir {path} belongs to another user; name another")
            if found.st_mode & 0o077:
                raise SettingsError(
                    f"--runtime-dir {path} is open to other users; name another, or chmod 700 it"
                )
            return hold(path / LOCK)
        except FileNotFoundError:
            if path.exists():
                raise
            # A pipeline that ends has just removed the directory.


def _clear(path: Path) -> None:
    for name in SOCKETS:
        for leftover in (*path.glob(f"{name}.sock"), *path.glob(f"{name}.sock.lock")):
            leftover.unlink(missing_ok=True)
