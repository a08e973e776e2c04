"""Tool calls in an answer, in the form that Qwen3 and Hermes models write.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Bern"}}
    </tool_call>

What is found is a function of the text alone, however the text comes in pieces.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Annotated, Any, Final, NamedTuple

import msgspec
from msgspec import Meta

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"

# Within a JSON string: what ends the string, escapes a character, or may not be there.
_IN_STRING: Final = re.compile(r'["\\\x00-\x1f]')
# Between strings: what is not white space, a number, a literal, a comma or a colon.
_BETWEEN_STRINGS: Final = re.compile(r"[^ \t\r\n\w+\-.,:]")


class ToolCall(NamedTuple):
    """`arguments` is the text of a JSON object, as the model has written it."""

    name: str
    arguments: str


class _State(Enum):
    CONTENT = auto()
    IN_CALL = auto()
    BEHIND_CALL = auto()


class ToolCallParser:
    """Splits an answer into its content and its tool calls.

    A call is given once it is complete, so that its arguments are valid JSON. Text that begins like
    a call and is none stays content, markers included. White space beside a call belongs to the
    call.
    """

    def __init__(self) -> None:
        self._state = _State.CONTENT
        self._text = ""
        self._at = 0  # what of `_text` was given
        self._beside_call = False  # whether a call was what was given last
        # In a call: where its JSON begins and how far it was read, whether the reading is within a
        # string, and how many brackets are open.
        self._begin = self._read = 0
        self._in_string = False
        self._depth = 0

    def feed(self, text: str) -> list[str | ToolCall]:
        """The content and the calls that are certain, now that `text` has come."""
        self._text = self._text[self._at :] + text
        self._begin -= self._at
        self._read -= self._at
        self._at = 0
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
        end = self._end_of_json()
        if end is None and not final:
            return False
        call = _tool_call(self._text[self._begin : end]) if end else None
        if call is None or end is None:
            self._state = _State.CONTENT
            self._give(found, self._begin)
        else:
            self._state = _State.BEHIND_CALL
            self._beside_call = True
            self._at = end
            found.append(call)
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
        self._begin = self._read = begin + len(OPEN)
        self._in_string, self._depth = False, 0
        self._state = _State.IN_CALL
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

    def _end_of_json(self) -> int | None:
        """Where the call's JSON object ends; 0 if it cannot be JSON, None if it has not ended."""
        text = self._text
        while self._read < len(text):
            found = (_IN_STRING if self._in_string else _BETWEEN_STRINGS).search(text, self._read)
            if not self._depth and text[self._read : found and found.start()].strip():
                return 0
            if found is None:
                self._read = len(text)
                break
            sign = found.group()
            if sign == "\\":
                if found.end() == len(text):
                    self._read = found.start()
                    break
                self._read = found.end() + 1
                continue
            self._read = found.end()
            if sign == '"' and self._depth:
                self._in_string = not self._in_string
            elif self._in_string or not (sign == "{" or (sign in "[]}" and self._depth)):
                return 0
            else:
                self._depth += 1 if sign in "{[" else -1
                if not self._depth:
                    return self._read
        return None


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


def _marker_at_end(text: str) -> int:
    """Where the end of `text` begins that may become `OPEN`; the length of `text` if none may."""
    begin = text.rfind(OPEN[0], max(0, len(text) - len(OPEN)))
    return begin if begin >= 0 and OPEN.startswith(text[begin:]) else len(text)
