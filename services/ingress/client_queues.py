"""What clients have sent and the core has not handled yet: one queue of frames for each client."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from nanovllm.protocol import ClientMessage, Error
from nanovllm.services.ingress import frames
from nanovllm.services.ingress.frames import Limits
from nanovllm.services.ingress.sessions import Session

# What a queued frame counts beside its bytes: more than it takes in memory. Small frames are read
# faster than they are handled, and meanwhile ZeroMQ holds more that is not counted. So a client
# that sends without end has to be disconnected soon.
OVERHEAD_BYTES = 4096


class Asked(NamedTuple):
    """One message of a client, whose frame had `size` bytes, or the error that answers the
    frame."""

    session: Session
    message: ClientMessage | Error
    size: int


@dataclass(slots=True)
class _ClientQueue:
    """The frames of one client, not decoded, in the order of arrival. None stands for a ZeroMQ
    message that was not one frame. `size` is what the frames count."""

    frames: deque[bytes | None] = field(default_factory=deque)
    size: int = 0


class ClientQueues:
    """The client queues. Clients take turns, one message each, so that a client that sends
    thousands of messages delays no other client's.

    Attributes:
        size: what all queues count, in bytes.
    """

    def __init__(self, limits: Limits) -> None:
        self.size = 0
        self._limits = limits
        # In the order of the clients' turns; none is empty.
        self._queues: OrderedDict[Session, _ClientQueue] = OrderedDict()

    def __bool__(self) -> bool:
        """Whether a message waits."""
        return bool(self._queues)

    def add(self, session: Session, frame: bytes | None) -> None:
        """Appends to the client's queue; None is a ZeroMQ message that was not one frame."""
        queue = self._queues.get(session)
        if queue is None:
            queue = self._queues[session] = _ClientQueue()
        size = OVERHEAD_BYTES + len(frame or b"")
        queue.frames.append(frame)
        queue.size += size
        self.size += size

    def drop(self, session: Session) -> None:
        """Drops the queue of a client that has gone."""
        queue = self._queues.pop(session, None)
        if queue is not None:
            self.size -= queue.size

    def largest(self) -> Session:
        """The client whose queue counts most."""
        return max(self._queues, key=lambda session: self._queues[session].size)

    def take(self, max_messages: int, max_bytes: int) -> Iterator[Asked]:
        """Decodes and yields the next messages, until `max_messages` have been taken, or frames
        of `max_bytes` in all; the last frame may go beyond."""
        while self._queues and max_messages > 0 and max_bytes > 0:
            session, queue = self._queues.popitem(last=False)
            frame = queue.frames.popleft()
            size = len(frame or b"")
            queue.size -= OVERHEAD_BYTES + size
            self.size -= OVERHEAD_BYTES + size
            if queue.frames:
                self._queues[session] = queue
            max_messages -= 1
            max_bytes -= size
            yield Asked(session, frames.parse(frame, self._limits), size)
