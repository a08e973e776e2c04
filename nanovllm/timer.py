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
    """A timer to poll. It is more exact than a thread that sleeps: neither the kernel's timer slack
    nor a wait for the interpreter's lock adds to the delay.

    Raises:
        OSError: the system has no descriptor left.
    """

    def __init__(self) -> None:
        self.descriptor: int = _libc.timerfd_create(
            time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC
        )
        if self.descriptor < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")

    def set(self, when: float) -> None:
        """Makes the descriptor readable from `when` (`time.monotonic()`) on, perhaps at once."""
        nanoseconds = max(1, int(when * 1e9))
        timer = _Timer(value=_Timespec(*divmod(nanoseconds, 10**9)))
        if _libc.timerfd_settime(self.descriptor, _TIMER_ABSTIME, ctypes.byref(timer), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")

    def clear(self) -> None:
        """Makes the descriptor unreadable until the next time that is set."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.descriptor, 8)

    def close(self) -> None:
        os.close(self.descriptor)
