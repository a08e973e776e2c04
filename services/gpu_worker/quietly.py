"""What a worker does before it is ready takes no core from workers that run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeVar

from nanovllm.service import OFF_STEP_PATH_NICENESS

T = TypeVar("T")


def quietly(body: Callable[[], T]) -> T:
    """Calls `body` in a thread of its own, which yields the CPU to others, as do the threads that
    it starts. A thread of Linux has its own niceness; a process could not take its own back."""
    results: list[T] = []
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), OFF_STEP_PATH_NICENESS)
            results.append(body())
        except BaseException as error:  # raised again in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=guarded, name="start", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
