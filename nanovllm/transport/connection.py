"""One connection of a link: the header of its frames, and the window that bounds them.

A high-water mark cannot bound what waits for a reader: libzmq 4.3.5 reads no further from a
connection whose receive queue is full, and if that connection ends, the next heartbeat or ping
aborts the process.
So the sockets have no marks, and the sender bounds what it sends. Each header says how many frames
of messages its sender has read; at most `WINDOW` may be sent beyond these. A reader that sends
nothing else says it in a frame without messages.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

# Frames of messages that are sent, and not known to be read. More would not make a link faster, and
# fewer are merged sooner by a sender whose peer is slow.
WINDOW: Final = 256
# After so many frames a reader says that it has read them.
_CONFIRMED_AT_ONCE: Final = WINDOW // 4


# In front of each payload: to which incarnation, from which incarnation, on which connection, and
# how many frames of messages the sender has read on it.
HEADER: Final = struct.Struct("<QQIQ")


@dataclass(slots=True)
class Connection:
    """What has gone each way on a connection, in frames of messages.

    Attributes:
        number: what the connecting side calls it.
        routing_id: what the binding side's ROUTER calls it.
        sent, confirmed: what was sent, and how much of that the peer says it has read.
        read, told: what was read, and how much of that the peer was told of.
    """

    number: int
    routing_id: bytes = b""
    sent: int = 0
    confirmed: int = 0
    read: int = 0
    told: int = 0

    def is_same(self, other: Connection) -> bool:
        return (self.number, self.routing_id) == (other.number, other.routing_id)

    @property
    def full(self) -> bool:
        return self.sent - self.confirmed >= WINDOW

    def has_read(self) -> bool:
        """One more frame was read. Returns whether to tell the peer now."""
        self.read += 1
        return self.read - self.told >= _CONFIRMED_AT_ONCE

    def header(self, to: int, sender: int) -> bytes:
        return HEADER.pack(to, sender, self.number, self.read)
