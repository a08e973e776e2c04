"""What a person sees who waits: the progress bars of a pipeline's start and of `LLM.generate`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Self

if TYPE_CHECKING:
    from rich.progress import Progress

    from nanovllm.control import ServiceStatus

# After so long without an answer a person is told what is waited for.
PATIENCE_S: Final = 2.0
REFRESH_S: Final = 0.5
# A start's bar is drawn again this soon, though its numbers may change at any message.
REDRAW_S: Final = 0.1


class Shown(NamedTuple):
    """What the bar shows: `done` of `total` units of a stage."""

    stage: str
    done: int
    total: int


_UNITS: Final = {
    "starting": "services",
    "starting engines": "engines",
    "measuring memory": "steps and graphs",
    "capturing graphs": "graphs",
}


class LoadingBar:
    """Shows what the services load, summed over all ranks; before and after that, how many services
    are ready.

    Drawn only on a terminal.
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._stage = ""
        self._due = 0.0
        self._since = (0.0, 0)  # when the stage began, and what was done by then

    def show(self, services: Sequence[ServiceStatus]) -> None:
        self.draw(progress(services))

    def draw(self, shown: Shown | None) -> None:
        if shown is None or not sys.stderr.isatty():
            self.close()
            return
        if self._bar is None or shown.stage != self._stage:
            self.close()
            self._stage = shown.stage
            self._since = time.perf_counter(), shown.done
            self._bar = _new_bar(transient=True)
            self._bar.add_task(shown.stage, total=shown.total, told=self._told(shown))
            self._bar.start()
            self._due = 0.0
        if (now := time.perf_counter()) < self._due:
            return
        self._due = now + REDRAW_S
        (task,) = self._bar.task_ids
        self._bar.update(
            task, completed=shown.done, total=shown.total, told=self._told(shown), refresh=True
        )

    def write(self, line: str) -> None:
        """Writes a line, or several, above the bar."""
        if self._bar is None:
            sys.stderr.write(f"{line}\n")
        else:
            self._bar.console.out(line, highlight=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _told(self, shown: Shown) -> str:
        """The numbers beside the bar, with a rate for bytes only: steps and graphs differ too much
        in the time they take."""
        from rich.filesize import decimal

        unit = _UNITS.get(shown.stage)
        if unit is not None:
            return f"{shown.done}/{shown.total} {unit}"
        began, before = self._since
        rate = (shown.done - before) / max(time.perf_counter() - began, 1e-3)
        return f"{decimal(shown.done)}/{decimal(shown.total)}, {decimal(int(rate))}/s"


def progress(services: Sequence[ServiceStatus]) -> Shown | None:
    """How far the start is; None if all `services` are ready, or there is none yet."""
    loading = [service.loading for service in services if service.loading is not None]
    if loading:
        stage = loading[-1].stage
        parts = [part for part in loading if part.stage == stage]
        return Shown(stage, sum(part.done for part in parts), sum(part.total for part in parts))
    ready = sum(service.state == "ready" for service in services)
    return Shown("starting", ready, len(services)) if ready < len(services) else None


def _new_bar(*, transient: bool) -> Progress:
    """A bar on stderr, drawn when it is told to refresh, with what the field `told` says beside
    it. Other lines that are written to stderr meanwhile appear above it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[told]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=transient,
        redirect_stdout=False,
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
        self._prompts = prompts
        self._done = 0
        self._shown = 0
        self._generated = generated
        self._before = max(before, generated()) if shown else before
        self._started = time.perf_counter()
        self._due = self._started + REFRESH_S
        self._bar = _new_bar(transient=False) if shown else None

    def done(self, tokens: int) -> None:
        """One more prompt is done, with `tokens` output tokens."""
        self._done += 1
        self.tokens += tokens
        self._shown = max(self._shown, self.tokens)

    def tick(self) -> None:
        """Redraws the bar, if it is time. Reports are rarer than redraws, and between two reports
        the rate must not fall: the tokens shown only grow."""
        if self._bar is not None and time.perf_counter() >= self._due:
            self._due = time.perf_counter() + REFRESH_S
            self._shown = max(self._shown, self._generated() - self._before)
            self._draw()

    def __enter__(self) -> GenerationBar:
        if self._bar is not None:
            self._bar.add_task("Generating", total=self._prompts, told="")
            self._draw()
            self._bar.start()
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            if failure is None:
                self._shown = self.tokens
            self._draw()
            self._bar.stop()

    def _draw(self) -> None:
        if self._bar is not None:
            rate = self._shown / (time.perf_counter() - self._started)
            told = (
                f"{self._done}/{self._prompts} prompts, {self._shown} tokens, {rate:.0f} tokens/s"
            )
            (task,) = self._bar.task_ids
            self._bar.update(task, completed=self._done, told=told, refresh=True)
