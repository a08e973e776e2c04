"""A connection in a thread of its own, for programs without an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from nanovllm.client.connection import Connection
from nanovllm.client.results import Pending


class ConnectionThread:
    """Runs one connection. Any thread may call its methods.

    Args:
        endpoint, timeout, keys: see `Connection`, and what it raises.
    """

    def __init__(self, endpoint: str, timeout: float, keys: str | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        try:
            self.connection = Connection(endpoint, timeout, keys, self._loop)
        except BaseException:
            self._loop.close()
            raise
        self._thread = threading.Thread(target=self._run, name="nanovllm client", daemon=True)
        self._thread.start()

    def submit(self, *pendings: Pending) -> None:
        """Sends requests or pings; each calls its `on_change` in the connection's thread.

        Raises:
            RuntimeError: the connection is closed, or this process was forked since it was made.
        """
        self.connection.check_process()
        self._call(self.connection.submit, *pendings)
        # What was submitted before this was set fails in `_run`.
        if self.connection.closed:
            raise RuntimeError("the client is closed")

    def abandon(self, *pendings: Pending) -> None:
        """Aborts requests, or drops pings. Does not wait, so that a destructor may call this."""
        self._call(self.connection.abandon, *pendings)

    def close(self) -> None:
        """Disconnects, and waits for the end of the thread. What is unfinished fails."""
        self._call(self.connection.close)
        self._call(self._loop.stop)
        # A destructor may run in the connection's thread.
        if not self.connection.inherited and threading.current_thread() is not self._thread:
            self._thread.join()

    def _call(self, function: Callable[..., object], *pendings: Pending) -> None:
        if not self.connection.inherited:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(function, *pendings)

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.run_until_complete(asyncio.sleep(0))  # what was called in the meantime
        self._loop.close()


class Waiters:
    """The threads that wait for a change.

    Python's own Condition and Event stay locked if Ctrl-C comes while they are being locked: the
    connection's thread would then wait for ever. Here nothing is locked.
    """

    def __init__(self) -> None:
        self._waiters: deque[SimpleQueue[None]] = deque()

    def notify(self) -> None:
        """Wakes all. Never blocks."""
        while self._waiters:
            self._waiters.popleft().put(None)

    def wait_for(self, happened: Callable[[], object]) -> None:
        """Returns when `happened`, which is asked again after each `notify`."""
        while not happened():
            waiter: SimpleQueue[None] = SimpleQueue()
            self._waiters.append(waiter)
            if not happened():  # else the change came before the waiter was there
                waiter.get()
