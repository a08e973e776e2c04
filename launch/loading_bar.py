"""One progress bar for the start of a pipeline."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

from tqdm import tqdm

from nanovllm.control import ServiceStatus

_UNITS: Final[dict[str, str]] = {"loading weights": "B", "capturing graphs": " graphs"}


class LoadingBar:
    """What the services load, all ranks together; before that, how many of them are ready.

    Drawn on a terminal only.
    """

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._stage = ""

    def show(self, services: Sequence[ServiceStatus]) -> None:
        stage: str
        loading = [service.loading for service in services if service.loading is not None]
        if loading:
            stage = loading[-1].stage
            parts = [part for part in loading if part.stage == stage]
            done, total = sum(part.done for part in parts), sum(part.total for part in parts)
        else:
            stage = "starting"
            done, total = sum(service.state == "ready" for service in services), len(services)
        if stage != self._stage:
            self.close()
            self._stage = stage
            unit = _UNITS.get(stage, " services")
            self._bar = tqdm(
                desc=stage, unit=unit, unit_scale=unit == "B", disable=None, leave=False
            )
        if self._bar is not None and not self._bar.disable:
            self._bar.total, self._bar.n = total, done
            self._bar.refresh()

    def write(self, line: str) -> None:
        """A line above the bar."""
        tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
