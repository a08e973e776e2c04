"""What a worker does before it is ready takes no core from engines that run.

This module is imported before anything that takes time to import.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeVar

# The launcher sets it for a worker that starts while another engine runs.
QUIET_VARIABLE = "NANOVLLM_QUIET_START"
OFF_STEP_PATH_NICENESS = 10

T = TypeVar("T")


def quietly(body: Callable[[], T]) -> T:
    """Calls `body`. Beside an engine that runs, it does so in a thread of its own, which yields the
    CPU to others, as do the threads that it starts. A process could not take its own niceness
    back."""
    if QUIET_VARIABLE not in os.environ:
        return body()
    results: list[T] = []
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            os.nice(OFF_STEP_PATH_NICENESS)  # of this thread alone
            results.append(body())
        except BaseException as error:  # raised again in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=guarded, name="start", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
