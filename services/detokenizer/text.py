"""Text of one output, token by token: whole characters, and nothing of a stop string.

What is released after k tokens is a function of those tokens and the request's text options (stop
strings, answer marks) alone, so that a replay of the tokens releases the same pieces.
"""

from __future__ import annotations

from array import array
from codecs import utf_8_decode
from collections.abc import Mapping
from typing import Final, NamedTuple

from nanovllm.messages import AnswerMarks


class TextDecoder:
    """Bytes of tokens into characters.

    Incomplete characters are kept until they are complete or cannot be; bytes that are no UTF-8
    become U+FFFD as soon as that is known. All pieces, joined, and the `rest` are the decoding of
    all bytes at once. The state is three bytes at most, whatever comes in.

    Args:
        text: of each token id its bytes; others add nothing.
    """

    __slots__ = ("_pending", "_text")

    def __init__(self, text: Mapping[int, bytes]) -> None:
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


class AnswerFinder:
    """Tells reasoning from the answer that comes after it, as `AnswerMarks` says.

    White space that comes first is held, until the token after it tells which of both it belongs
    to. So no text of an answer is released before the answer has begun.

    Attributes:
        found: whether the answer has begun; then no more tokens are to be given.
        reasons: whether reasoning has begun, and the answer has not.
        held: text of the answer that was held.
    """

    __slots__ = ("_marks", "found", "held", "reasons")

    def __init__(self, marks: AnswerMarks) -> None:
        self._marks: Final = marks
        self.found = False
        self.reasons = marks.reasons
        self.held = ""

    def reasoning(self, token_id: int, text: str) -> str:
        """The text of reasoning that this token releases, markers included; `text` is what the
        token adds to the text."""
        if self.reasons:
            self.found = token_id == self._marks.close
            self.reasons = not self.found
            return text
        self.held += text
        if token_id == self._marks.open:
            self.reasons = True
            text, self.held = self.held, ""
            return text
        self.found = bool(self.held) and not self.held.isspace()
        return ""


class StopFinder:
    """Holds back text that may become a stop string, and cuts at the one that comes.

    Attributes:
        found: whether a stop string has come; what follows it is not to be fed.

    Args:
        stops: non-empty strings.
        include: whether the stop string that comes is released, too.
    """

    __slots__ = ("_first_characters", "_held", "_include", "_state", "_stops", "found")

    def __init__(self, stops: list[str], include: bool = False) -> None:
        self._include: Final = include
        self._stops: Final = _Automaton(stops)
        self._first_characters: Final = frozenset(stop[0] for stop in stops)
        self._state = 0
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that can be released, now that `text` has come.

        The end of all text so far that may be the start of a stop string is held. Where this text
        completes stop strings, all is released that comes before the one that starts first.
        """
        if not self._held and self._first_characters.isdisjoint(text):
            return text
        self._state, match = self._stops.read(self._state, text)
        known = len(self._held)
        text = self._held + text
        if match is not None:
            self.found = True
            self._held = ""
            return text[: known + (match.end if self._include else match.start)]
        cut = len(text) - self._stops.depth[self._state]
        self._held = text[cut:]
        return text[:cut]

    def rest(self) -> str:
        """What is held, now that no more text comes."""
        held, self._held = self._held, ""
        return held


class _Match(NamedTuple):
    """Where in a text a stop string stands: it may begin before the text, at a negative index."""

    start: int
    end: int


class _Automaton:
    """Stop strings, found in a text in time that is linear in the text (Aho-Corasick).

    A state stands for the start of a stop string: the longest one that the text so far ends with.
    State 0 is the empty start. Each state but a few goes on with one character, to the next number;
    `_branches` holds the others, so that 16 strings of 256 characters take some 60 kB.

    Attributes:
        depth: the characters of each state.
    """

    __slots__ = ("_branches", "_fallback", "_match", "_next", "depth")

    def __init__(self, stops: list[str]) -> None:
        self.depth = array("H", [0])
        # The character that leads from a state to the next number; "" if none does.
        self._next = [""]
        self._branches: dict[tuple[int, str], int] = {}
        # The longest stop string that ends with a state; 0 if none does.
        self._match = array("H", [0])
        # The longest start that a state ends with, other than itself.
        self._fallback = array("H", [0])
        reached_by = [(0, "")]
        for stop in stops:
            state = 0
            for char in stop:
                if self._next[state] == char:
                    state += 1
                elif (state, char) in self._branches:
                    state = self._branches[state, char]
                else:
                    reached_by.append((state, char))
                    state = self._add(state, char)
            self._match[state] = len(stop)
        for state in sorted(range(1, len(self.depth)), key=self.depth.__getitem__):
            before, char = reached_by[state]
            if before:
                self._fallback[state], _ = self.read(self._fallback[before], char)
            self._match[state] = self._match[state] or self._match[self._fallback[state]]

    def read(self, state: int, text: str) -> tuple[int, _Match | None]:
        """The state after `text`, and of the stop strings that end in `text` the one that begins
        first; None if none does."""
        branches, following, fallback, match = (
            self._branches,
            self._next,
            self._fallback,
            self._match,
        )
        first: _Match | None = None
        for end, char in enumerate(text, 1):
            while following[state] != char:
                branch = branches.get((state, char))
                if branch is not None or not state:
                    state = branch or 0
                    break
                state = fallback[state]
            else:
                state += 1
            if (length := match[state]) and (first is None or end - length < first.start):
                first = _Match(end - length, end)
        return state, first

    def _add(self, before: int, char: str) -> int:
        state = len(self.depth)
        if state == before + 1:
            self._next[before] = char
        else:
            self._branches[before, char] = state
        self._next.append("")
        self.depth.append(self.depth[before] + 1)
        self._match.append(0)
        self._fallback.append(0)
        return state
