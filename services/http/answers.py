"""One chat's output, told apart: reasoning, content and tool calls."""

from __future__ import annotations

from typing import NamedTuple

from nanovllm.services.http.tool_calls import ToolCall, ToolCallParser


class Reasoning(NamedTuple):
    text: str


# A str is content.
Piece = str | ToolCall | Reasoning


class Markers(NamedTuple):
    """The texts of the tokens around reasoning; empty where they add none to the output."""

    begin: str
    end: str


class AnswerReader:
    """Tells the pieces of one output apart, as its text comes.

    Args:
        markers: None where the request says nothing of reasoning: all is the answer.
        tools: whether the answer may hold tool calls.
    """

    def __init__(self, markers: Markers | None, *, tools: bool) -> None:
        self._markers = markers
        self._reasoned = False  # whether text of reasoning has come
        self._answers = markers is None
        self._calls = ToolCallParser() if tools else None

    def feed(self, text: str, answer_at: int | None) -> list[Piece]:
        """The pieces that are certain, now that `text` has come.

        Args:
            answer_at: where the answer begins in `text`, if it does.
        """
        found: list[Piece] = []
        if not self._answers:
            reasoning = self._without_markers(text[:answer_at], answer_at is not None)
            if reasoning:
                found.append(Reasoning(reasoning))
            if answer_at is None:
                return found
            self._answers = True
            text = text[answer_at:]
        if self._calls is not None:
            found += self._calls.feed(text)
        elif text:
            found.append(text)
        return found

    def rest(self) -> list[Piece]:
        """What was held, now that no more text comes."""
        return [] if self._calls is None else [*self._calls.rest()]

    def _without_markers(self, text: str, ends: bool) -> str:
        """The text of reasoning. A marker comes in one piece, and white space may come before the
        first."""
        assert self._markers is not None
        if ends:
            text = text.removesuffix(self._markers.end)
        if not self._reasoned and text:
            self._reasoned = True
            bare = text.lstrip()
            if self._markers.begin and bare.startswith(self._markers.begin):
                return bare.removeprefix(self._markers.begin)
        return text
