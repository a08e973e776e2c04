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
    """What the bar shows: `done` of `total` units of a stage."""

    stage: str
    done: int
    total: int


_UNITS: Final = {
    "starting": "services",
    "measuring memory": "steps and graphs",
    "capturing graphs": "graphs",
}


class LoadingBar:
    """Shows what the services load, summed over all ranks; before and after that, how many services
    are ready.

    Drawn only on a terminal.
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
        """Writes a line, or several, above the bar."""
        tqdm.write(f"{line}\n", file=sys.stderr, end="")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> LoadingBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def progress(services: Sequence[ServiceStatus]) -> Shown | None:
    """How far the start is; None if all `services` are ready, or there is none yet."""
    loading = [service.loading for service in services if service.loading is not None]
    if loading:
        stage = loading[-1].stage
        parts = [part for part in loading if part.stage == stage]
        return Shown(stage, sum(part.done for part in parts), sum(part.total for part in parts))
    ready = sum(service.state == "ready" for service in services)
    return Shown("starting", ready, len(services)) if ready < len(services) else None


def _new_bar(shown: Shown) -> tqdm[Any]:
    """A bar with a rate for bytes only: steps and graphs differ too much in the time they take."""
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
    """Shows the prompts done and the tokens so far, which grow also while no prompt is done.

    Args:
        prompts: how many prompts there are.
        generated: returns the tokens that the pipeline has generated since its start, as of its
            latest report, which may be a second old. Called every `REFRESH_S`.
        before: the tokens that earlier calls got from the pipeline.
        shown: whether to draw the bar.
    """

    def __init__(
        self, prompts: int, generated: Callable[[], int], before: int, *, shown: bool
    ) -> None:
        self.tokens = 0  # of the prompts that are done
        self._shown = 0
        self._generated = generated
        self._before = max(before, generated()) if shown else before
        self._started = time.perf_counter()
        self._due = self._started + REFRESH_S
        self._bar: tqdm[Any] = tqdm(total=prompts, desc="Generating", disable=not shown)

    def done(self, tokens: int) -> None:
        """One more prompt is done, with `tokens` output tokens."""
        self.tokens += tokens
        self._raise_to(self.tokens)
        self._bar.update()

    def tick(self) -> None:
        """Redraws the bar, if it is time."""
        now = time.perf_counter()
        if not self._bar.disable and now >= self._due:
            self._due = now + REFRESH_S
            self._raise_to(self._generated() - self._before)
            self._bar.refresh()

    def __enter__(self) -> GenerationBar:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is None:
            self._show(self.tokens)
        self._bar.close()

    def _raise_to(self, tokens: int) -> None:
        """Shows `tokens` if they are more than before: reports are rarer than redraws, and between
        two reports the rate must not fall."""
        if tokens > self._shown:
            self._show(tokens)

    def _show(self, tokens: int) -> None:
        self._shown = tokens
        rate = tokens / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(f"{tokens} tokens, {rate:.0f} tokens/s", refresh=False)
