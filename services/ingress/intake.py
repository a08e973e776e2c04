"""What clients sent and nobody has looked at yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from nanovllm.protocol import ClientMessage, Error
from nanovllm.services.ingress import frames
from nanovllm.services.ingress.frames import Limits
from nanovllm.services.ingress.sessions import Exchange, Session


class Asked(NamedTuple):
    """One message of a client, or the error that answers it; None: its exchange has no more."""

    session: Session
    exchange: Exchange | None
    message: ClientMessage | Error | None


class _Frame(NamedTuple):
    session: Session
    exchange: Exchange | None
    elements: Iterator[msgspec.Raw | Error]


class Intake:
    """ZeroMQ messages in the order of arrival, given out a few of their elements at a time, so
    that an array of thousands stops nobody's stream."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._frames: deque[_Frame] = deque()

    def __bool__(self) -> bool:
        """Whether there is something to look at."""
        return bool(self._frames)

    def add(self, session: Session, parts: list[bytes]) -> None:
        exchange = Exchange() if len(parts) > 1 and not parts[0] else None
        self._frames.append(_Frame(session, exchange, iter(self._elements(parts, exchange))))

    def take(self, at_most: int) -> Iterator[Asked]:
        """The next messages of clients that are still there."""
        while self._frames and at_most > 0:
            session, exchange, elements = self._frames[0]
            element = None if session.closed else next(elements, None)
            if element is None:
                self._frames.popleft()
                if exchange is not None and not session.closed:
                    yield Asked(session, exchange, None)
            elif isinstance(element, Error):
                yield Asked(session, exchange, element)
            else:
                yield Asked(session, exchange, frames.parse(element, self._limits))
            at_most -= 1

    def _elements(
        self, parts: list[bytes], exchange: Exchange | None
    ) -> list[msgspec.Raw] | list[Error]:
        if len(parts) != (1 if exchange is None else 2):
            reason = f"{len(parts)} frames: a message is one, or an empty delimiter and one"
            return [Error(id=None, code="invalid_request", message=reason)]
        elements = frames.split(parts[-1], self._limits)
        return [elements] if isinstance(elements, Error) else elements
