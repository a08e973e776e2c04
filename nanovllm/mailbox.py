"""What threads say to a loop, which a pipe wakes up."""

from __future__ import annotations

import os
import threading
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Items on their way from threads to the loop.

    Attributes:
        descriptor: readable when there are items.
    """

    def __init__(self) -> None:
        self.descriptor, self._write_end = os.pipe()
        self._lock = threading.Lock()
        # The pipe has one byte while there are items.
        self._items: list[T | BaseException] = []

    def put(self, *items: T | BaseException) -> None:
        """Passes on items, or the exception that ends a thread. The loop takes them together."""
        with self._lock:
            were_none = not self._items
            self._items += items
            if items and were_none:
                os.write(self._write_end, b"\0")

    def take(self) -> list[T]:
        """All items so far. Raises the exception that was put, if there is one."""
        if not self._items:  # as at most wake-ups
            return []
        with self._lock:
            os.read(self.descriptor, 1)
            items, self._items = self._items, []
        taken: list[T] = []
        for item in items:
            if isinstance(item, BaseException):
                raise item
            taken.append(item)
        return taken
