"""Runs a process for each rank of a group."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable


def run_ranks(target: Callable[..., None], ranks: int, *args: object) -> None:
    """Calls `target` with a rank and `args` in a process for each rank."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=(rank, *args)) for rank in range(ranks)]
    deadline = time.monotonic() + 90
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=max(0, deadline - time.monotonic()))
        assert [process.exitcode for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
