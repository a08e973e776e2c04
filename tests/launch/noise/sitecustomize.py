"""Lets the services of one role write too much.

Python imports this module first where its directory is on the PYTHONPATH. `NANOVLLM_TEST_NOISE` is
`ROLE:KIND`: `log` is many lines in each turn of the loop, `lines` and `line` are output without
end, with and without newlines.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from nanovllm.control import Stats
from nanovllm.service import Service

ROLE, _, KIND = os.environ["NANOVLLM_TEST_NOISE"].partition(":")
MESSAGE = "x" * 1000
WITHOUT_END = {"lines": b"x\n" * 2048, "line": b"x" * 4096}

run = Service.run


def write_without_end() -> NoReturn:
    while True:
        try:
            os.write(2, WITHOUT_END[KIND])
        except BlockingIOError:
            select.select([], [2], [])


def run_with_noise(
    self: Service, step: Callable[[float], float | None], stats: Callable[[], Stats]
) -> NoReturn:
    def noisy_step(now: float) -> float | None:
        for _ in range(100):
            logging.info(MESSAGE)
        return step(now)

    if KIND == "log":
        run(self, noisy_step, stats)
    threading.Thread(target=write_without_end, daemon=True).start()
    run(self, step, stats)


if f"nanovllm.services.{ROLE}" in sys.orig_argv:
    Service.run = run_with_noise  # type: ignore[method-assign]
