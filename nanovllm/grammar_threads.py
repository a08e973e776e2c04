"""Threads that compile grammars."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Generic, TypeVar

import msgspec

from nanovllm.grammars import Grammars
from nanovllm.protocol import StructuredOutputs

# Texts of so many bytes take most of a second to compile, and the largest many seconds.
LARGE_BYTES: Final = 8 << 10
THREADS: Final = 4
THREADS_FOR_LARGE: Final = 2

T = TypeVar("T")


class GrammarThreads(Generic[T]):
    """Threads that read the vocabulary, and then work on grammars. Large grammars have threads of
    their own, so that small ones never wait for them.

    Requests with one grammar are worked on by one thread at a time, and together: many that arrive
    at once stay together, and wait for one compilation.

    Args:
        load: reads the vocabulary. Called once, at once: to read a large vocabulary keeps all other
            threads waiting for half a second, which no step should meet.
        work: called on a thread, with some requests that have one grammar. Raises nothing.
    """

    def __init__(
        self,
        load: Callable[[], Grammars],
        work: Callable[[Future[Grammars], Sequence[T]], object],
    ) -> None:
        self._small = ThreadPoolExecutor(THREADS, "grammars")
        self._large = ThreadPoolExecutor(THREADS_FOR_LARGE, "large-grammars")
        self._grammars = self._small.submit(load)
        self._work = work
        self._lock = threading.Lock()
        # Of each grammar that a thread works on: the requests that wait for the thread.
        self._waiting: dict[bytes, list[T]] = {}

    def submit(self, asked: StructuredOutputs, request: T) -> None:
        """Gives a request, with this grammar, to a thread."""
        key = msgspec.msgpack.encode(asked)
        with self._lock:
            if key in self._waiting:
                self._waiting[key].append(request)
                return
            self._waiting[key] = [request]
        threads = self._large if asked.size > LARGE_BYTES else self._small
        threads.submit(self._work_on, threads, key)

    def _work_on(self, threads: ThreadPoolExecutor, key: bytes) -> None:
        with self._lock:
            requests, self._waiting[key] = self._waiting[key], []
        try:
            self._work(self._grammars, requests)
        finally:  # whatever it raises, requests that come later do not wait for ever
            with self._lock:
                more = bool(self._waiting[key])
                if not more:
                    del self._waiting[key]
            if more:
                threads.submit(self._work_on, threads, key)  # behind other grammars
