"""The progress bars: of a pipeline's start, and of `LLM.generate`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from tqdm import tqdm

from nanovllm.control import ServiceStatus

REFRESH_S: Final = 0.5


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


class GenerationBar:
    """Prompts done, and the tokens so far; it moves also while no prompt is done.

    Args:
        prompts: how many there are.
        generated: asked now and then while it is drawn: the tokens that the pipeline has generated
            since its start, as far as is known.
        before: the tokens that earlier calls got from it; what it says may be a second old.
        shown: draw it.

    Attributes:
        tokens: those of the prompts that are done.
    """

    def __init__(
        self, prompts: int, generated: Callable[[], int], before: int, *, shown: bool
    ) -> None:
        self.tokens = 0
        self._told = 0
        self._generated = generated
        self._before = max(before, generated()) if shown else before
        self._started = time.perf_counter()
        self._due = self._started + REFRESH_S
        self._bar: tqdm[Any] = tqdm(total=prompts, desc="Generating", disable=not shown)

    def done(self, tokens: int) -> None:
        """One more prompt is done, with so many tokens."""
        self.tokens += tokens
        self._note(self.tokens)
        self._bar.update()

    def tick(self) -> None:
        """Draws it anew, if it is time."""
        now = time.perf_counter()
        if not self._bar.disable and now >= self._due:
            self._due = now + REFRESH_S
            self._note(self._generated() - self._before)
            self._bar.refresh()

    def __enter__(self) -> GenerationBar:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is None:
            self._tell(self.tokens)
        self._bar.close()

    def _note(self, tokens: int) -> None:
        """There are so many tokens at least. A rate stays until there are more, since reports come
        more seldom than it is drawn."""
        if tokens > self._told:
            self._tell(tokens)

    def _tell(self, tokens: int) -> None:
        self._told = tokens
        rate = tokens / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(f"{tokens} tokens, {rate:.0f} tokens/s", refresh=False)
