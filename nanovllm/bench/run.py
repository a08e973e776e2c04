"""The loop between a load and its client."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from itertools import islice
from typing import Final

from nanovllm.bench.client import LoadClient
from nanovllm.bench.load import Load

# Between two ticks: a tick that draws takes about a millisecond, for which nothing is read.
TICK_S: Final = 0.5
# Requests sent before the clock is read, and answers are, again.
SENT_AT_ONCE: Final = 16


def drive(
    load: Load,
    client: LoadClient,
    *,
    until: Callable[[], bool] = lambda: False,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Carries the load until it is over, or `until()`.

    Args:
        tick: called every `TICK_S`, and at the end, however that comes.

    Raises:
        PipelineUnavailable, RequestError: from the client and the load.
    """
    now = tick_at = time.monotonic()
    # The garbage collector would stop the loop for milliseconds, and a load makes no cycles.
    collects = gc.isenabled()
    gc.disable()
    try:
        while not (load.over(now) or until()):
            for request in islice(load.due(now), SENT_AT_ONCE):
                client.submit(request)
            if now >= tick_at:
                tick_at = now + TICK_S
                tick()
            messages = client.receive(min(load.due_at(now), tick_at))
            now = time.monotonic()
            load.take(messages, now)
    finally:
        if collects:
            gc.enable()
        tick()
