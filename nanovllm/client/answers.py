"""How a command shows an answer: as it comes, with what the model thinks dim."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

import click

from nanovllm.client.results import Completion, Delta
from nanovllm.client.sync import Stream

BEGIN_THINKING: Final = "<think>"
END_THINKING: Final = "</think>"


class Shown(NamedTuple):
    """An answer that was printed.

    Attributes:
        text: what was printed.
        completion: the whole answer; None if Ctrl-C stopped the answer.
    """

    text: str
    completion: Completion | None


def show(stream: Stream, begin: Iterable[Delta] = ()) -> Shown:
    """Prints an answer until it ends or Ctrl-C stops it; what comes next has a line of its own.

    Args:
        stream: the answer.
        begin: its deltas that were read already.

    Raises what iterating over `stream` raises.
    """
    thinking = ThinkingSplitter()
    text = ""
    completion = None
    try:
        with stream:
            for delta in itertools.chain(begin, stream):
                text += delta.text
                _print(thinking.split(delta.text))
            completion = stream.result()
    except KeyboardInterrupt:
        pass
    finally:
        _print(thinking.rest())
        if completion is not None or text:
            click.echo()
    return Shown(text, completion)


def cut(completion: Completion, max_tokens: int | None) -> str | None:
    """What cut the answer, in words; None if the model ended the answer."""
    if completion.finish_reason != "length":
        return None
    if completion.usage.completion_tokens == max_tokens:
        return f"cut by --max-tokens {max_tokens}"
    return "cut: prompt and answer fill the model's length"


def note(text: str) -> None:
    """Tells something about an answer, dim and beside stdout; only on a terminal."""
    if sys.stderr.isatty():
        click.echo(dim(f"[{text}]"), err=True)


def dim(text: str) -> str:
    """`text` for a terminal to show dim; as it is where the person wants no styles, or the terminal
    has none."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else click.style(text, dim=True)


class ThinkingSplitter:
    """Splits text that comes in pieces into what the model thinks, from <think> to </think>, and
    what it says."""

    def __init__(self) -> None:
        self._thinking = False
        self._held = ""  # may be the beginning of a tag

    def split(self, text: str) -> Iterator[tuple[str, bool]]:
        """Parts of the text so far that were not yielded yet, each with whether it is thinking."""
        text = self._held + text
        while (at := text.find(self._tag)) >= 0:
            end = at + len(self._tag) if self._thinking else at
            yield text[:end], self._thinking
            text = text[end:]
            self._thinking = not self._thinking
        held = next(n for n in range(len(self._tag) - 1, -1, -1) if text.endswith(self._tag[:n]))
        self._held = text[len(text) - held :]
        yield text[: len(text) - held], self._thinking

    def rest(self) -> Iterator[tuple[str, bool]]:
        """What `split` has held back."""
        held, self._held = self._held, ""
        yield held, self._thinking

    @property
    def _tag(self) -> str:
        return END_THINKING if self._thinking else BEGIN_THINKING


def _print(parts: Iterable[tuple[str, bool]]) -> None:
    for text, thinking in parts:
        if text:
            click.echo(dim(text) if thinking else text, nl=False)
