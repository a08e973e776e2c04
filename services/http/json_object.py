"""JSON as it comes: whether the text so far can become a JSON object, and where that ends."""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Final

_SPACE: Final = re.compile(r"[ \t\r\n]+")
# Within a string: what ends the string, escapes a character, or may not be there.
_IN_STRING: Final = re.compile(r'["\\\x00-\x1f]')
_ESCAPE: Final = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_BEGUN_ESCAPE: Final = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_WORD: Final = re.compile(r"[\w+\-.]*")
_SCALAR: Final = re.compile(
    r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null", re.ASCII
)


class _Expects(Enum):
    OBJECT = auto()
    FIRST_KEY = auto()  # or the end of the object
    KEY = auto()
    COLON = auto()
    FIRST_VALUE = auto()  # or the end of the array
    VALUE = auto()
    NEXT = auto()  # a comma, or the end of the object or array
    NOTHING = auto()


_E = _Expects
_VALUES: Final = (_E.VALUE, _E.FIRST_VALUE)
# By sign: what is expected before it may come, and behind it.
_STRING: Final = {_E.FIRST_KEY: _E.COLON, _E.KEY: _E.COLON, **dict.fromkeys(_VALUES, _E.NEXT)}
_BEGINS: Final = {"{": _E.FIRST_KEY, "[": _E.FIRST_VALUE}
_ENDS: Final = {"}": ("{", _E.FIRST_KEY), "]": ("[", _E.FIRST_VALUE)}


class JsonObjectReader:
    """Reads one JSON object.

    Attributes:
        depth: how many brackets are open.
        ended: whether the object is complete.
        broken: whether the text cannot become JSON. Of what passes a decoder may still refuse half
            a surrogate pair and the like.
    """

    def __init__(self) -> None:
        self.ended = False
        self.broken = False
        self._open: list[str] = []
        self._expects = _E.OBJECT
        self._in_string = False

    @property
    def depth(self) -> int:
        return len(self._open)

    def read(self, text: str, at: int) -> int:
        """Reads on from `at`, up to behind the next bracket; gives the position reached.

        A number, a literal or an escaped character that `text` ends within is read by a later call.
        """
        while at < len(text) and not self.broken:
            depth, before = self.depth, at
            at = self._in(text, at) if self._in_string else self._between(text, at)
            if at == before or self.depth != depth:
                break
        return at

    def _in(self, text: str, at: int) -> int:
        """Reads within a string, up to its end or an escaped character."""
        found = _IN_STRING.search(text, at)
        if found is None:
            return len(text)
        if found.group() == '"':
            self._in_string = False
            return found.end()
        if escape := _ESCAPE.match(text, found.start()):
            return escape.end()
        self.broken = not _BEGUN_ESCAPE.match(text, found.start())
        return found.start()

    def _between(self, text: str, at: int) -> int:
        """Reads white space or one sign, number or literal between strings."""
        if space := _SPACE.match(text, at):
            return space.end()
        sign, expects = text[at], self._expects
        if sign == '"' and expects in _STRING:
            self._in_string = True
            self._expects = _STRING[expects]
        elif sign in _BEGINS and (expects in _VALUES or (expects is _E.OBJECT and sign == "{")):
            self._open.append(sign)
            self._expects = _BEGINS[sign]
        elif sign in _ENDS and self._ends(*_ENDS[sign]):
            self._open.pop()
            self.ended = not self._open
            self._expects = _E.NOTHING if self.ended else _E.NEXT
        elif sign == ":" and expects is _E.COLON:
            self._expects = _E.VALUE
        elif sign == "," and expects is _E.NEXT:
            self._expects = _E.KEY if self._open[-1] == "{" else _E.VALUE
        else:
            return self._scalar(text, at)
        return at + 1

    def _ends(self, begin: str, empty: _Expects) -> bool:
        return self._open[-1:] == [begin] and self._expects in (empty, _E.NEXT)

    def _scalar(self, text: str, at: int) -> int:
        end = _WORD.match(text, at).end()  # type: ignore[union-attr]
        if self._expects in _VALUES and end == len(text) and end > at:
            return at  # more of it may come
        if self._expects not in _VALUES or not _SCALAR.fullmatch(text, at, end):
            self.broken = True
            return at
        self._expects = _E.NEXT
        return end
