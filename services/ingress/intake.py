"""What clients sent and nobody has looked at yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from nanovllm.protocol import ClientMessage, Error
from nanovllm.services.ingress import frames
from nanovllm.services.ingress.frames import Limits
from nanovllm.services.ingress.sessions import Exchange, Session

# Messages of one client that are looked at before it is another's turn.
MESSAGES_A_TURN = 16
# What a ZeroMQ frame takes in memory beside its bytes, roughly.
OVERHEAD_BYTES = 256


class Asked(NamedTuple):
    """One message of a client, of `size` bytes, or the error that answers it; None: its exchange
    has no more."""

    session: Session
    exchange: Exchange | None
    message: ClientMessage | Error | None
    size: int = 0


class _Pile:
    """What one client sent.

    Attributes:
        unopened: ZeroMQ messages as their frames, in the order of arrival.
        size: how many bytes those take, roughly.
        exchange, elements: of the message that is being looked at. Only this one is taken apart,
            since the elements of a frame can take a hundred times its memory.
    """

    def __init__(self) -> None:
        self.unopened: deque[list[bytes]] = deque()
        self.size = 0
        self.exchange: Exchange | None = None
        self.elements: Iterator[msgspec.Raw | Error] | None = None


class Intake:
    """ZeroMQ messages in the order in which each client sent them, given out a few of their
    elements at a time, from one client after the other: so an array of thousands stops nobody's
    stream, and thousands of arrays nobody's request.

    Attributes:
        size: how many bytes it holds, roughly.
    """

    def __init__(self, limits: Limits) -> None:
        self.size = 0
        self._limits = limits
        # In the order of their turns.
        self._piles: dict[Session, _Pile] = {}

    def __bool__(self) -> bool:
        """Whether there is something to look at."""
        return bool(self._piles)

    def add(self, session: Session, parts: list[bytes]) -> None:
        pile = self._piles.get(session)
        if pile is None:
            pile = self._piles[session] = _Pile()
        pile.unopened.append(parts)
        pile.size += _size(parts)
        self.size += _size(parts)

    def drop(self, session: Session) -> None:
        """Its client has gone."""
        pile = self._piles.pop(session, None)
        if pile is not None:
            self.size -= pile.size

    def largest(self) -> Session:
        """Whose messages take the most."""
        return max(self._piles, key=lambda session: self._piles[session].size)

    def take(self, at_most: int, at_most_bytes: int) -> Iterator[Asked]:
        """The next messages; the last may go beyond `at_most_bytes`."""
        while self._piles and at_most > 0 and at_most_bytes > 0:
            session = next(iter(self._piles))
            pile = self._piles.pop(session)
            for _ in range(MESSAGES_A_TURN):
                if pile.elements is None:
                    if not pile.unopened:
                        break
                    at_most_bytes -= self._open(pile)
                asked = self._next(session, pile)
                at_most -= 1
                at_most_bytes -= asked.size
                yield asked
                if at_most <= 0 or at_most_bytes <= 0:
                    break
            if pile.elements is not None or pile.unopened:
                self._piles[session] = pile

    def _next(self, session: Session, pile: _Pile) -> Asked:
        element = None if pile.elements is None else next(pile.elements, None)
        exchange = pile.exchange
        if element is None:
            pile.elements = pile.exchange = None
            return Asked(session, exchange, None)
        if isinstance(element, Error):
            return Asked(session, exchange, element)
        size = memoryview(element).nbytes
        return Asked(session, exchange, frames.parse(element, self._limits), size)

    def _open(self, pile: _Pile) -> int:
        """Takes the next message apart; returns its size."""
        parts = pile.unopened.popleft()
        size = _size(parts)
        pile.size -= size
        self.size -= size
        if len(parts) > 1 and not parts[0]:
            pile.exchange = Exchange()
        pile.elements = iter(self._elements(parts, pile.exchange))
        return size

    def _elements(
        self, parts: list[bytes], exchange: Exchange | None
    ) -> Sequence[msgspec.Raw | Error]:
        if len(parts) != (1 if exchange is None else 2):
            reason = f"{len(parts)} frames: a message is one, or an empty delimiter and one"
            return [Error(id=None, code="invalid_request", message=reason)]
        elements = frames.split(parts[-1], self._limits)
        return [elements] if isinstance(elements, Error) else elements


def _size(parts: list[bytes]) -> int:
    return sum(OVERHEAD_BYTES + len(part) for part in parts)
