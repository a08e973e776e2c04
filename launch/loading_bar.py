"""One progress bar for the start of a pipeline."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from tqdm import tqdm

from nanovllm.control import ServiceStatus


class Shown(NamedTuple):
    """What the bar shows: how much of a stage is done, of how much."""

    stage: str
    done: int
    total: int


_UNITS: Final = {
    "starting": "services",
    "measuring memory": "steps and graphs",
    "capturing graphs": "graphs",
}


class LoadingBar:
    """What the services load, all ranks together; before and after that, how many of them are
    ready, until all are.

    Drawn on a terminal only.
    """

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._stage = ""

    def show(self, services: Sequence[ServiceStatus]) -> None:
        shown = progress(services)
        if shown is None:
            self.close()
            return
        if self._bar is None or shown.stage != self._stage:
            self.close()
            self._stage = shown.stage
            self._bar = _new_bar(shown)
        if not self._bar.disable:
            self._bar.total, self._bar.n = shown.total, shown.done
            self._bar.refresh()

    def write(self, line: str) -> None:
        """A line above the bar."""
        tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def progress(services: Sequence[ServiceStatus]) -> Shown | None:
    """How far the start is; None when there is nothing to wait for, and before there is anything
    to tell."""
    loading = [service.loading for service in services if service.loading is not None]
    if loading:
        stage = loading[-1].stage
        parts = [part for part in loading if part.stage == stage]
        return Shown(stage, sum(part.done for part in parts), sum(part.total for part in parts))
    ready = sum(service.state == "ready" for service in services)
    return Shown("starting", ready, len(services)) if ready < len(services) else None


def _new_bar(shown: Shown) -> tqdm[Any]:
    """Of bytes it tells the rate too; other things differ too much in the time that they take."""
    unit = _UNITS.get(shown.stage)
    return tqdm(
        desc=shown.stage,
        total=shown.total,
        initial=shown.done,
        unit=unit or "B",
        unit_scale=unit is None,
        bar_format=unit and "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}]",
        disable=None,
        leave=False,
    )
