"""Text of one output, token by token: whole characters, and nothing of a stop string.

What is released after k tokens is a function of those tokens and the stop strings alone, so that
a replay of the tokens releases the same pieces.
"""

from __future__ import annotations

from codecs import utf_8_decode
from typing import Final


class TextDecoder:
    """Bytes of tokens into characters.

    Incomplete characters are kept until they are complete or cannot be; bytes that are no UTF-8
    become U+FFFD as soon as that is known. All pieces, joined, and the `rest` are the decoding of
    all bytes at once. The state is three bytes at most, whatever comes in.

    Args:
        text: of each token id its bytes; others add nothing.
    """

    __slots__ = ("_pending", "_text")

    def __init__(self, text: dict[int, bytes]) -> None:
        self._text: Final = text
        self._pending = b""

    def step(self, token_id: int) -> str:
        """The characters that this token completes."""
        raw = self._pending + self._text.get(token_id, b"")
        piece, used = utf_8_decode(raw, "replace", False)
        self._pending = raw[used:]
        return piece

    def rest(self) -> str:
        """What is left at the end of the output: U+FFFD for an incomplete character."""
        piece, _ = utf_8_decode(self._pending, "replace", True)
        self._pending = b""
        return piece


class StopFinder:
    """Holds back text that may become a stop string, and cuts before the one that comes.

    Attributes:
        found: whether a stop string has come; what follows it is not to be fed.

    Args:
        stops: non-empty strings.
    """

    __slots__ = ("_first_characters", "_held", "_longest", "_stops", "found")

    def __init__(self, stops: list[str]) -> None:
        self._stops: Final = stops
        self._longest: Final = max(map(len, stops))
        self._first_characters: Final = frozenset(stop[0] for stop in stops)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that can be released, now that `text` has come.

        The end of all text so far that may be the start of a stop string is held. Where this text
        completes stop strings, all is released that comes before the one that starts first.
        """
        if not self._held and self._first_characters.isdisjoint(text):
            return text
        text = self._held + text
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.found = True
            self._held = ""
            return text[: min(starts)]
        cut = self._start_of_held(text)
        self._held = text[cut:]
        return text[:cut]

    def rest(self) -> str:
        """What is held, now that no more text comes."""
        held, self._held = self._held, ""
        return held

    def _start_of_held(self, text: str) -> int:
        """Where the longest end of `text` begins that starts some stop string."""
        first = len(text)
        earliest = max(0, first - self._longest + 1)
        for stop in self._stops:
            start = text.find(stop[0], earliest, first)
            while start >= 0 and not stop.startswith(text[start:]):
                start = text.find(stop[0], start + 1, first)
            if start >= 0:
                first = start
        return first
