"""How long a device had work."""

from __future__ import annotations

import threading


class BusyMeter:
    """Adds up the time in which at least one step was launched and not finished.

    Times are seconds of one clock; `launched` and `finished` may be called by different threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight = 0
        self._busy = 0.0
        self._since = 0.0

    def launched(self, now: float) -> None:
        with self._lock:
            if self._in_flight == 0:
                self._since = now
            self._in_flight += 1

    def finished(self, now: float) -> float:
        """Notes the end of a step. Returns the busy time up to `now`."""
        with self._lock:
            self._in_flight -= 1
            self._busy += now - self._since
            self._since = now
            return self._busy
