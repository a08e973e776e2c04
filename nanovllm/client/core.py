"""The client's side of the protocol, without sockets or clocks.

The core keeps every unfinished request with the output received so far. A connection is lost when
its socket says so, when the session changed, or when nothing was heard for long. The core then asks
for a new connection, and submits everything again there: each stream resumes where it stood.

After each wake-up the owner of the socket gives what has arrived to `receive`, tells what became
of the connection (`reached`, `unreachable`, `disconnected`), calls `advance`, opens a new
connection if `advance` says so (`renewed`), sends the `frames`, and tells whoever waits for what
has `changed`.
"""

from __future__ import annotations

import logging
from typing import Final

import msgspec

from nanovllm.client.results import (
    Pending,
    PendingPing,
    PendingRequest,
    PipelineUnavailable,
    RequestError,
)
from nanovllm.protocol import (
    Abort,
    Accepted,
    Delta,
    Error,
    Finish,
    Ping,
    Pong,
    ServerMessage,
)

log = logging.getLogger(__name__)

# Between two pings, while anything is pending: a lost session is noticed after about this long.
PING_PERIOD_S: Final = 1.0
# Before an overloaded ingress, or a connection on which nothing was heard, is tried again.
RETRY_S: Final = 0.5
# How long a client that never reached anything waits where nothing listens: longer than an ingress
# takes to start again.
UNREACHABLE_TIMEOUT_S: Final = 1.0

_encode = msgspec.msgpack.Encoder().encode


class ClientCore:
    """Everything that one client waits for.

    Args:
        endpoint: where the client connects; for messages to people.
        timeout: seconds without an answer after which the pipeline is taken to be gone, and
            everything pending fails. After half of `timeout`, a new connection is tried. Where
            nothing listens, a client that never reached anything waits UNREACHABLE_TIMEOUT_S.
        has_key: whether the client connects with a key.
    """

    def __init__(self, endpoint: str, timeout: float, *, has_key: bool = False) -> None:
        self._endpoint = endpoint
        self._timeout = timeout
        self._has_key = has_key
        self._decoder = msgspec.msgpack.Decoder(list[ServerMessage])
        self._pending: dict[str, Pending] = {}
        self._changed: list[Pending] = []
        self._outgoing: list[bytes] = []
        self._closed: str | None = None  # why, once the client is closed
        # The current connection.
        self._session: str | None = None
        self._lost = False
        self._heard_here = False
        self._opened_at = 0.0
        self._unreachable = False
        self._reached_ever = False  # over any connection
        self._turned_away = False
        # Silence counts only while a ping is unanswered and `advance` is called, so that a program
        # that does other things between two deltas does not take the pipeline for dead.
        self._now: float | None = None
        self._pinged = False
        self._heard = False
        self._heard_ever = False
        self._silent_s = 0.0
        self._renew_when_silent_s = timeout / 2
        self._ping_at = 0.0
        # Requests that an overloaded ingress refused, and when they are submitted again.
        self._refused: list[PendingRequest] = []
        self._retry_at: float | None = None

    # What the program wants ---------------------------------------------------------------------

    def submit(self, pending: Pending) -> None:
        """A new request or ping; it fails if the client is closed."""
        if self._closed is not None:
            self._fail(pending, RuntimeError(self._closed))
            return
        self._outgoing.append(pending.encoded())
        self._pending[str(pending.message.id)] = pending

    def abandon(self, pending: Pending) -> None:
        """No call waits for `pending` any more. A request is aborted; later answers are dropped."""
        if self._pending.pop(str(pending.message.id), None) is None:
            return
        self._changed.append(pending)
        if isinstance(pending, PendingRequest):
            self._outgoing.append(_encode(Abort(id=pending.message.id)))
            if pending in self._refused:
                self._refused.remove(pending)

    def close(self, reason: str) -> None:
        """The client is closed: everything pending fails."""
        self._closed = reason
        self._fail_all(RuntimeError, reason)

    # What the owner of the socket tells ---------------------------------------------------------

    def receive(self, frame: bytes) -> None:
        try:
            messages = self._decoder.decode(frame)
        except (ValueError, RecursionError) as error:
            self._fail_all(
                PipelineUnavailable,
                f"what answers at {self._endpoint} does not speak this client's protocol: {error}",
            )
            return
        self._heard = self._heard_here = self._heard_ever = True
        for message in messages:
            self._take(message)

    def reached(self) -> None:
        """Something listens at the endpoint."""
        self._reached_ever = True

    def unreachable(self) -> None:
        """Nothing listens at the endpoint; the socket goes on trying."""
        self._unreachable = True

    def disconnected(self) -> None:
        """The connection has ended, and the session with it."""
        self._lost = True

    def key_refused(self) -> None:
        """Something at the endpoint does not take the client's key."""
        self._fail_all(
            PipelineUnavailable,
            f"the pipeline at {self._endpoint} does not take this client's key: it is not one of"
            " the pipeline's, or was taken back",
        )

    def not_understood(self) -> None:
        """What is at the endpoint does not connect as this client does."""
        why = "wants a key: name the client's key file by keys, --keys or NANOVLLM_KEYS"
        if self._has_key:
            why = "takes no keys: drop keys, --keys and NANOVLLM_KEYS"
        self._fail_all(
            PipelineUnavailable, f"what listens at {self._endpoint} is no pipeline, or {why}"
        )

    def turned_away(self) -> None:
        """The connection ended before the two sides knew each other."""
        self._turned_away = True

    def advance(self, now: float) -> bool:
        """Does what is due at `now` (seconds, any monotonic clock).

        Returns whether the connection is to be replaced by a new one; then call `renewed`.
        """
        before, self._now = self._now, now if self._pending else None
        if self._heard or not self._pending:
            self._heard, self._pinged, self._silent_s = False, False, 0.0
            self._renew_when_silent_s = self._timeout / 2
        elif before is not None and self._pinged:
            self._silent_s += min(now - before, PING_PERIOD_S)
            if self._silent_s >= self._patience_s:
                self._fail_all(PipelineUnavailable, self._no_answer())
            elif self._silent_s >= self._renew_when_silent_s:
                self._lost = True
        if self._pending and now >= self._ping_at:
            self._ping_at = now + PING_PERIOD_S
            self._pinged = True
            self._outgoing.append(_encode(Ping()))
        if self._refused and self._retry_at is None:
            self._retry_at = now + RETRY_S
        elif self._retry_at is not None and now >= self._retry_at:
            self._outgoing += [request.encoded() for request in self._refused]
            self._refused.clear()
            self._retry_at = None
        return self._lost and (self._heard_here or now >= self._opened_at + RETRY_S)

    def renewed(self, now: float) -> None:
        """There is a new connection: everything pending is submitted again.

        What was submitted to an ingress that answered was held there, so that it waits for room.
        """
        if self._heard_here:
            for pending in self._pending.values():
                if isinstance(pending, PendingRequest):
                    pending.waits_for_room = True
        self._session, self._lost, self._heard_here = None, False, False
        self._unreachable = False
        self._opened_at = now
        self._renew_when_silent_s = self._silent_s + self._timeout / 2
        self._refused.clear()
        self._outgoing = [pending.encoded() for pending in self._pending.values()]

    def frames(self) -> list[bytes]:
        """What to send now, a message a frame; nothing to a connection that is lost."""
        if self._lost:
            return []
        frames, self._outgoing = self._outgoing, []
        return frames

    def changed(self) -> list[Pending]:
        """What has got output or an answer since the last call, perhaps more than once."""
        changed, self._changed = self._changed, []
        return changed

    def wait_s(self, now: float) -> float | None:
        """The seconds until `advance` must be called at the latest; None: no need to."""
        due: list[float] = []
        if self._pending:
            due.append(self._ping_at)
        if self._pinged:
            limit = self._patience_s if self._lost else self._renew_when_silent_s
            due.append(now + min(limit, self._patience_s) - self._silent_s)
        if self._retry_at is not None:
            due.append(self._retry_at)
        if self._lost:
            due.append(now if self._heard_here else self._opened_at + RETRY_S)
        return max(0.0, min(due) - now) if due else None

    # What the ingress says ----------------------------------------------------------------------

    def _take(self, message: ServerMessage) -> None:
        if isinstance(message, Pong | Accepted):
            if self._session is None:
                self._session = message.session
            elif self._session != message.session:
                self._lost = True  # the socket reconnected by itself
        if isinstance(message, Error) and message.id is None:
            self._refuse_a_frame(message)
            return
        pending = self._pending.get(str(message.id))
        if isinstance(pending, PendingRequest):
            self._answer(pending, message)
        elif isinstance(pending, PendingPing) and isinstance(message, Pong):
            pending.answer = message
            self._end(pending)

    def _answer(self, request: PendingRequest, message: ServerMessage) -> None:
        if isinstance(message, Accepted):
            request.accept(message.seed)
            self._changed.append(request)
        elif isinstance(message, Delta):
            if request.extend(message):
                self._changed.append(request)
            else:
                self.abandon(request)
                self._fail(request, RequestError("internal", "the stream has a gap or a repeat"))
        elif isinstance(message, Finish):
            request.finish(message)
            self._end(request)
        elif isinstance(message, Error):
            if message.code in ("overloaded", "shutting_down") and request.waits_for_room:
                self._refused.append(request)
            else:
                self._fail(request, RequestError(message.code, message.message))

    def _refuse_a_frame(self, error: Error) -> None:
        """An error without an id: a frame was larger than the ingress reads. Of the requests that
        the ingress has not answered, only the largest can have been in that frame."""
        requests = [r for r in self._pending.values() if isinstance(r, PendingRequest)]
        largest = max(requests, key=lambda request: request.unanswered_bytes, default=None)
        if largest is None or not largest.unanswered_bytes:
            log.error("%s: %s: %s", self._endpoint, error.code, error.message)
        else:
            self._fail(largest, RequestError(error.code, error.message))

    def _end(self, pending: Pending) -> None:
        self._pending.pop(str(pending.message.id), None)
        self._changed.append(pending)

    def _fail(self, pending: Pending, failure: Exception) -> None:
        pending.failure = failure
        self._end(pending)

    def _fail_all(self, error: type[Exception], message: str) -> None:
        for pending in list(self._pending.values()):
            self._fail(pending, error(message))
        self._refused.clear()
        self._lost = True  # no call waits for what still comes over this connection

    @property
    def _nothing_listens(self) -> bool:
        return self._unreachable and not self._reached_ever

    @property
    def _patience_s(self) -> float:
        return min(self._timeout, UNREACHABLE_TIMEOUT_S) if self._nothing_listens else self._timeout

    def _no_answer(self) -> str:
        if self._heard_ever:
            return (
                f"the pipeline at {self._endpoint} is gone: it has not answered for"
                f" {self._timeout:g} s"
            )
        why = "nothing listens there" if self._nothing_listens else f"waited {self._timeout:g} s"
        if self._has_key and self._turned_away:
            why += "; is the key one of another pipeline's?"
        return (
            f"no pipeline answers at {self._endpoint} ({why});"
            " start one with `nanovllm-launch`, or name another endpoint"
        )
