"""A descriptor that becomes readable at a given time, exactly (Linux's timerfd)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time

_libc = ctypes.CDLL(None, use_errno=True)
_TIMER_ABSTIME = 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Timer(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Timer:
    """Unlike a thread that sleeps, it wakes whoever polls it: no thread is in between, and neither
    the system's timer slack nor a wait for the interpreter's lock adds to the delay.

    Raises:
        OSError: if the system has none to give.
    """

    def __init__(self) -> None:
        self.descriptor: int = _libc.timerfd_create(
            time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC
        )
        if self.descriptor < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")

    def set(self, when: float) -> None:
        """Becomes readable at `when` (`time.monotonic()`), at once if that has passed."""
        nanoseconds = max(1, int(when * 1e9))
        timer = _Timer(value=_Timespec(*divmod(nanoseconds, 10**9)))
        if _libc.timerfd_settime(self.descriptor, _TIMER_ABSTIME, ctypes.byref(timer), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")

    def clear(self) -> None:
        """Is not readable any more, until the next time that is set."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.descriptor, 8)

    def close(self) -> None:
        os.close(self.descriptor)
