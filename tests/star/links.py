"""A link in memory that loses what a real one may: around an `Up`, the end of what was sent."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nanovllm.transport.links import Peer

Signal = Literal["up", "down"]


@dataclass(eq=False)
class End:
    """One side of a link. `peer` is the process that holds it; the callbacks are that process's."""

    peer: Peer
    on_up: Callable[[Peer], None]
    on_down: Callable[[Peer], None]
    on_message: Callable[[Peer, Any], None]
    other: Peer | None = None  # while this side believes in the connection
    inbox: deque[Signal | Any] = field(default_factory=deque)


class Link:
    """Two sides, one of which binds, and at most one connection at a time."""

    def __init__(self, binder: End, connector: End) -> None:
        self.binder = binder
        self.connector = connector
        self.stands = False
        self.closed = False  # the connecting side wants no connection
        self.cut = False  # no connection can be made

    def send(self, sender: End, messages: Sequence[Any]) -> bool:
        """As a link's `send`: False if the other side is not there. What is sent on a connection
        that has ended is lost."""
        if sender.other is None:
            return False
        if self.stands:
            receiver = self.connector if sender is self.binder else self.binder
            receiver.inbox.extend(messages)
        return True

    def make(self) -> None:
        """A connection is made anew once both sides know that the last one has ended."""
        both = (self.binder, self.connector)
        if self.stands or self.closed or self.cut or any(end.inbox or end.other for end in both):
            return
        self.stands = True
        self.binder.other = self.connector.peer
        self.connector.inbox.append("up")
        self.binder.on_up(self.connector.peer)

    def lose(self, draw: random.Random) -> None:
        """The connection ends, and with it some of what was on its way last."""
        if not self.stands:
            return
        self.stands = False
        for end in (self.binder, self.connector):
            for _ in range(draw.randrange(len(end.inbox) + 1)):
                end.inbox.pop()
            end.inbox.append("down")

    def close(self, draw: random.Random) -> None:
        """The connecting side closes its socket, and reads nothing more."""
        self.closed = True
        self.lose(draw)
        self.connector.inbox.clear()
        self.connector.other = None

    def replace(self, old: End, new: End, draw: random.Random) -> None:
        """The process of one side has died; another takes its place."""
        self.lose(draw)
        if old is self.binder:
            self.binder = new
        else:
            self.connector = new

    def deliver(self, end: End) -> bool:
        """The next event on one side; False if there is none."""
        if not end.inbox:
            return False
        event = end.inbox.popleft()
        other = self.connector if end is self.binder else self.binder
        if event == "up":
            end.other = other.peer
            end.on_up(other.peer)
        elif event == "down":
            if (peer := end.other) is not None:
                end.other = None
                end.on_down(peer)
        elif end.other is not None:
            end.on_message(end.other, event)
        return True
