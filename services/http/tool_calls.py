"""Tool calls in an answer, in the form that Qwen3 and Hermes models write.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Bern"}}
    </tool_call>

What is found, joined, is a function of the text alone, however the text comes in pieces.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Annotated, Any, Final, NamedTuple

import msgspec
from msgspec import Meta

from nanovllm.services.http.json_object import JsonObjectReader

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"

# A call up to the bracket of its arguments, as models write it. Group 1 is the name, as JSON.
_NAMED: Final = re.compile(
    r"""
    \s* \{ \s* "name" \s* : \s* ("[^"\\]* (?: \\. [^"\\]* )*") \s* ,
    \s* "arguments" \s* : \s* \{
    """,
    re.VERBOSE,
)


class ToolCall(NamedTuple):
    """A call, or a piece of one.

    Attributes:
        name: None in a piece that goes on with the latest call.
        arguments: text of a JSON object, as the model has written it.
        complete: whether this is the end of a call. A call without its end is none: text that began
            like a call, and is given as content, too. Its arguments are no JSON: their last bracket
            comes with the end alone.
    """

    name: str | None
    arguments: str
    complete: bool = True


class _State(Enum):
    CONTENT = auto()
    IN_CALL = auto()
    BEHIND_CALL = auto()


class ToolCallParser:
    """Splits an answer into its content and its tool calls.

    A call whose name comes before its arguments is given in pieces: the name once the arguments
    begin, then what comes of them. Another is given once it is complete. Text that begins like a
    call and is none stays content, markers included. White space beside a call belongs to the call.
    """

    def __init__(self) -> None:
        self._state = _State.CONTENT
        self._text = ""
        self._at = 0  # what of `_text` was given as content or as complete calls
        self._beside_call = False  # whether a call was what was given last

    def feed(self, text: str) -> list[str | ToolCall]:
        """The content and the calls that are certain, now that `text` has come."""
        if self._state is not _State.IN_CALL:
            self._text = self._text[self._at :]
            self._at = 0
        self._text += text
        return self._parse(final=False)

    def rest(self) -> list[str | ToolCall]:
        """What was held, now that no more text comes."""
        return self._parse(final=True)

    def _parse(self, final: bool) -> list[str | ToolCall]:
        found: list[str | ToolCall] = []
        while self._step(found, final):
            pass
        return found

    def _step(self, found: list[str | ToolCall], final: bool) -> bool:
        """Adds to `found` what comes next; False if nothing can be told before more text comes."""
        if self._state is _State.CONTENT:
            return self._content(found, final)
        if self._state is _State.BEHIND_CALL:
            self._skip_space()
            behind = self._text[self._at : self._at + len(CLOSE)]
            if behind == CLOSE:
                self._at += len(CLOSE)
            elif CLOSE.startswith(behind) and not final:
                return False
            self._state = _State.CONTENT
            return True
        self._read_call()
        if not (self._json.ended or self._json.broken or final):
            self._give_arguments(found)
            return False
        if (call := self._call()) is None:
            self._give_arguments(found)
            self._state = _State.CONTENT
            self._give(found, self._begin)
        else:
            self._state = _State.BEHIND_CALL
            self._beside_call = True
            self._at = self._read
            rest = self._text[self._given : self._end]
            found.append(ToolCall(None, rest) if self._name_given else call)
        return True

    def _content(self, found: list[str | ToolCall], final: bool) -> bool:
        if self._beside_call:
            self._skip_space()
        begin = self._text.find(OPEN, self._at)
        if begin < 0:
            end = len(self._text)
            self._give(found, end if final else self._without_space(_marker_at_end(self._text)))
            return False
        self._give(found, self._without_space(begin))
        self._begin_call(begin + len(OPEN))
        return True

    def _give(self, found: list[str | ToolCall], end: int) -> None:
        """Gives the text up to `end` as content."""
        if end > self._at:
            found.append(self._text[self._at : end])
            self._beside_call = False
            self._at = end

    def _skip_space(self) -> None:
        while self._text[self._at : self._at + 1].isspace():
            self._at += 1

    def _without_space(self, end: int) -> int:
        """Where the white space begins that comes before `end`, if there is any."""
        while end > self._at and self._text[end - 1].isspace():
            end -= 1
        return end

    def _begin_call(self, begin: int) -> None:
        self._state = _State.IN_CALL
        self._begin = self._read = begin
        self._json = JsonObjectReader()
        # Of a call that is given in pieces.
        self._name: str | None = None
        self._name_given = False
        # Of its arguments: where they begin and end, and what was given.
        self._arguments = self._end = self._given = 0

    def _read_call(self) -> None:
        """Reads on in the call's JSON. Finds where the arguments begin and end."""
        reader, text = self._json, self._text
        while not reader.ended:
            depth, before = reader.depth, self._read
            self._read = reader.read(text, before)
            if self._read == before:
                return
            if (depth, reader.depth) == (1, 2) and not self._arguments:
                if named := _NAMED.fullmatch(text, self._begin, self._read):
                    self._name = _name(named[1])
                    self._arguments = self._given = self._read - 1
            elif (depth, reader.depth) == (2, 1) and not self._end:
                self._end = self._read

    def _give_arguments(self, found: list[str | ToolCall]) -> None:
        """Gives what has come of the arguments, but for their last bracket."""
        if self._name is None:
            return
        if not self._name_given:
            self._name_given = True
            found.append(ToolCall(self._name, "", complete=False))
        end = self._end - 1 if self._end else self._read
        if end > self._given:
            found.append(ToolCall(None, self._text[self._given : end], complete=False))
            self._given = end

    def _call(self) -> ToolCall | None:
        """The call that has ended; None if it is none, or repeats its name or arguments."""
        if not self._json.ended:
            return None
        call = _tool_call(self._text[self._begin : self._read])
        arguments = self._text[self._arguments : self._end]
        return None if self._name and call != ToolCall(self._name, arguments) else call


class _Call(msgspec.Struct):
    name: Annotated[str, Meta(min_length=1)]
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


_call: Final = msgspec.json.Decoder(_Call)
_arguments: Final = msgspec.json.Decoder(dict[str, Any])


def _tool_call(text: str) -> ToolCall | None:
    try:
        call = _call.decode(text)
        _arguments.decode(call.arguments)
    except (ValueError, RecursionError):
        return None
    return ToolCall(call.name, bytes(call.arguments).decode())


def _name(text: str) -> str | None:
    """The name that is written so in JSON; None if it is none."""
    try:
        return msgspec.json.decode(text, type=str) or None
    except ValueError:
        return None


def _marker_at_end(text: str) -> int:
    """Where the end of `text` begins that may become `OPEN`; the length of `text` if none may."""
    begin = text.rfind(OPEN[0], max(0, len(text) - len(OPEN)))
    return begin if begin >= 0 and OPEN.startswith(text[begin:]) else len(text)
