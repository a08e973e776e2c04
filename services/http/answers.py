"""One chat's output, told apart: reasoning, content and tool calls."""

from __future__ import annotations

from typing import NamedTuple

from nanovllm.client.results import Completion
from nanovllm.protocol import Reasoning as ReasoningMarks
from nanovllm.services.http.context import ServedModel
from nanovllm.services.http.tool_calls import ToolCall, ToolCallParser


class Reasoning(NamedTuple):
    text: str


# A str is content.
Piece = str | ToolCall | Reasoning


class Markers(NamedTuple):
    """The texts of the tokens around reasoning; empty where they add none to the output."""

    begin: str
    end: str


def markers(model: ServedModel) -> Markers | None:
    """None where the model knows no reasoning."""
    if model.reasoning is None:
        return None
    begin, end = (
        "" if token in model.silent else model.token_text[token].decode()
        for token in (model.reasoning.open, model.reasoning.close)
    )
    return Markers(begin, end)


class AnswerReader:
    """Tells the pieces of one output apart, as its text comes.

    Line breaks around reasoning, and between it and the answer, belong to neither, as in the chat
    templates that write them there.

    Args:
        markers: None where the request says nothing of reasoning: all is the answer.
        tools: whether the answer may hold tool calls.
    """

    def __init__(self, markers: Markers | None, *, tools: bool) -> None:
        self._markers = markers
        self._reasoned = False  # whether text of reasoning, or a marker, has come
        self._bare = markers is not None  # whether line breaks that come now are dropped
        self._held = ""  # line breaks that end the reasoning, unless more of it comes
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
            reasoning = self._held + self._without_breaks(reasoning)
            if bare := reasoning.rstrip("\n"):
                found.append(Reasoning(bare))
            self._held = reasoning[len(bare) :]
            if answer_at is None:
                return found
            self._answers = True
            self._bare = self._reasoned
            text = text[answer_at:]
        text = self._without_breaks(text)
        if self._calls is not None:
            found += self._calls.feed(text)
        elif text:
            found.append(text)
        return found

    def rest(self) -> list[Piece]:
        """What was held, now that no more text comes."""
        return [] if self._calls is None else [*self._calls.rest()]

    def _without_breaks(self, text: str) -> str:
        """The text; without the line breaks that the reasoning, or an answer behind it, begins
        with."""
        if self._bare:
            text = text.lstrip("\n")
            self._bare = not text
        return text

    def _without_markers(self, text: str, ends: bool) -> str:
        """The text of reasoning. A marker comes in one piece, and white space may come before the
        first."""
        assert self._markers is not None
        begins = not self._reasoned
        self._reasoned |= bool(text)
        if ends:
            text = text.removesuffix(self._markers.end)
        if begins:
            bare = text.lstrip()
            if self._markers.begin and bare.startswith(self._markers.begin):
                return bare.removeprefix(self._markers.begin)
        return text


def reasoning_tokens(completion: Completion, reasoning: ReasoningMarks | None) -> int:
    """How many tokens of the output are reasoning, markers included.

    Args:
        reasoning: the tokens around reasoning; None where the model knows none.
    """
    tokens, answer_at = completion.token_ids, completion.answer_at
    if reasoning is None or answer_at == 0:
        return 0
    if answer_at is None:
        return len(tokens)
    return tokens.index(reasoning.close) + 1 if reasoning.close in tokens else 0
