"""One connection of a link: the header of its frames, and the window that bounds them.

A high-water mark cannot bound what waits for a reader: libzmq 4.3.5 reads no further from a
connection whose receive queue is full, and if that connection ends, the next heartbeat or ping
aborts the process.
So the sockets have no marks, and the sender bounds what it sends. Each header says how many frames
of messages its sender has read; at most `WINDOW` may be sent beyond these. A reader that sends
nothing else says it in a frame without messages.
"""

from __future__ import annotations

import logging
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from nanovllm.wording import counted

log = logging.getLogger(__name__)

# Frames of messages that are sent, and not known to be read. More would not make a link faster, and
# fewer are merged sooner by a sender whose peer is slow.
WINDOW: Final = 256
# After so many frames a reader says that it has read them.
_CONFIRMED_AT_ONCE: Final = WINDOW // 4


class Header(NamedTuple):
    """What stands in front of each payload.

    Attributes:
        to, sender: incarnations; `to` is 0 where the receiver's is not known yet.
        connection: the number that the connecting side gives it.
        read: how many frames of messages the sender has read on it.
    """

    to: int
    sender: int
    connection: int
    read: int


_HEADER = struct.Struct("<QQIQ")


def split(frame: memoryview) -> tuple[Header, memoryview] | None:
    """A frame's header and payload; None if the frame is too short, which is logged."""
    if len(frame) < _HEADER.size:
        log.error("dropped a message of %s", counted(len(frame), "byte"))
        return None
    return Header._make(_HEADER.unpack_from(frame)), frame[_HEADER.size :]


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

    @property
    def full(self) -> bool:
        return self.sent - self.confirmed >= WINDOW

    @property
    def must_confirm(self) -> bool:
        return self.read - self.told >= _CONFIRMED_AT_ONCE

    def header(self, to: int, sender: int) -> bytes:
        return _HEADER.pack(to, sender, self.number, self.read)
