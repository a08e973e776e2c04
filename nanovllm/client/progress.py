"""The progress bar of `LLM.generate`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from tqdm import tqdm

REFRESH_S: Final = 0.5


class Progress:
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

    def __enter__(self) -> Progress:
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
