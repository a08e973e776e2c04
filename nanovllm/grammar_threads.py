"""Threads that compile grammars."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from nanovllm.grammars import Grammars

# Texts of so many bytes take most of a second to compile, and the largest many seconds.
LARGE_BYTES: Final = 8 << 10
THREADS: Final = 4
THREADS_FOR_LARGE: Final = 2


class GrammarThreads:
    """Threads that read the vocabulary, and then work on grammars. Large grammars have threads of
    their own, so that small ones never wait for them.

    Args:
        load: reads the vocabulary. Called once, at once: to read a large vocabulary keeps all other
            threads waiting for half a second, which no step should meet.
    """

    def __init__(self, load: Callable[[], Grammars]) -> None:
        self._small = ThreadPoolExecutor(THREADS, "grammars")
        self._large = ThreadPoolExecutor(THREADS_FOR_LARGE, "large-grammars")
        self._grammars = self._small.submit(load)

    def submit(self, size: int, work: Callable[[Future[Grammars]], object]) -> None:
        """Calls `work` on a thread, for a grammar of `size` bytes. `work` raises nothing."""
        threads = self._large if size > LARGE_BYTES else self._small
        threads.submit(work, self._grammars)
