"""What threads say to a loop, which a pipe wakes up."""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Items on their way from threads to the loop.

    Attributes:
        descriptor: readable when there are items.
    """

    def __init__(self) -> None:
        self.descriptor, self._write_end = os.pipe()
        os.set_blocking(self.descriptor, False)
        os.set_blocking(self._write_end, False)
        self._items: deque[T | BaseException] = deque()

    def put(self, item: T | BaseException) -> None:
        """Passes on an item, or the exception that ends a thread."""
        self._items.append(item)
        with suppress(BlockingIOError):  # full, so the loop wakes up anyway
            os.write(self._write_end, b"\0")

    def take(self) -> list[T]:
        """All items so far. Raises the exception that was put, if there is one."""
        # The pipe first: an item put in between then costs a wake-up, but is not lost.
        with suppress(BlockingIOError):
            os.read(self.descriptor, 65536)
        taken: list[T] = []
        while self._items:
            item = self._items.popleft()
            if isinstance(item, BaseException):
                raise item
            taken.append(item)
        return taken
