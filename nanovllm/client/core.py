"""The client's side of the protocol, without sockets or clocks.

It keeps every unfinished request with the output received so far. When its connection turns out to
be gone (the shell says so, the session changed, or nothing is heard for long) it asks for a new one
and submits everything again there, resuming where each stream stood.

The shell, after each wake-up: gives what has arrived to `receive`, tells `disconnected`, calls
`advance`, opens a new connection if that says so (`renewed`), sends `frames`, and hands what
`changed` to whoever waits.
"""

from __future__ import annotations

import itertools
import logging
from typing import Final

import msgspec

from nanovllm.client.errors import PipelineUnavailable, RequestError
from nanovllm.client.tickets import Inquiry, Request, Ticket
from nanovllm.protocol import (
    Abort,
    Accepted,
    Error,
    Finish,
    Generate,
    Ping,
    Pong,
    ServerMessage,
)
from nanovllm.protocol import Delta as WireDelta

log = logging.getLogger(__name__)

# While requests are unfinished: a dead or changed session is noticed after about this long.
PING_PERIOD_S: Final = 1.0
# Before a refused request, or a connection on which nothing was heard, is tried again.
RETRY_S: Final = 0.5


class ClientCore:
    """Everything that one client waits for.

    Args:
        endpoint: where it connects; for messages to people.
        timeout: seconds without an answer after which the pipeline is taken to be gone, and
            everything unfinished fails. After half of it, a new connection is tried.
    """

    def __init__(self, endpoint: str, timeout: float) -> None:
        self._endpoint = endpoint
        self._timeout = timeout
        self._ids = itertools.count()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(list[ServerMessage])
        self._tickets: dict[str, Ticket] = {}
        self._changed: list[Ticket] = []
        self._outgoing: list[bytes] = []
        # Of this connection.
        self._session: str | None = None
        self._lost = False
        self._heard_here = False
        self._opened_at = 0.0
        # Time. Silence counts only while a ping is unanswered and the shell runs, so that a
        # program that does other things between two deltas is not taken for a pipeline's death.
        self._now: float | None = None
        self._asking = False
        self._heard = False
        self._heard_ever = False
        self._silent_s = 0.0
        self._renew_when_silent_s = timeout / 2
        self._ping_at = 0.0
        self._refused: list[Request] = []
        self._retry_at: float | None = None

    # What the program wants ---------------------------------------------------------------------

    def new_id(self) -> str:
        return str(next(self._ids))

    def submit(self, message: Generate, *, patient: bool = False) -> Request:
        """A new request; its id is from `new_id`.

        Args:
            message: the request.
            patient: when the ingress is overloaded, try again later instead of failing.
        """
        request = Request(message, patient)
        self._outgoing.append(request.encoded(self._encoder))
        self._tickets[message.id] = request
        return request

    def ping(self) -> Inquiry:
        inquiry = Inquiry(Ping(id=self.new_id()))
        self._outgoing.append(inquiry.encoded(self._encoder))
        self._tickets[str(inquiry.message.id)] = inquiry
        return inquiry

    def abandon(self, ticket: Ticket) -> None:
        """Its owner no longer wants it: a request is aborted, what still comes is dropped."""
        if self._tickets.pop(str(ticket.message.id), None) is None:
            return
        if isinstance(ticket, Request):
            self._outgoing.append(self._encoder.encode(Abort(id=ticket.message.id)))
            if ticket in self._refused:
                self._refused.remove(ticket)

    # What the shell tells -----------------------------------------------------------------------

    def receive(self, payload: bytes) -> None:
        """Takes one frame from the ingress."""
        try:
            messages = self._decoder.decode(payload)
        except (msgspec.DecodeError, RecursionError) as error:
            self._fail_all(
                f"what answers at {self._endpoint} does not speak this client's protocol: {error}"
            )
            return
        self._heard = self._heard_here = self._heard_ever = True
        for message in messages:
            self._take(message)

    def disconnected(self) -> None:
        """The connection has ended; so has the session."""
        self._lost = True

    def advance(self, now: float) -> bool:
        """Does what is due at `now` (seconds, any monotonic clock).

        Returns whether the shell is to replace its connection by a new one, and call `renewed`.
        """
        before, self._now = self._now, now if self._tickets else None
        if self._heard or not self._tickets:
            self._heard, self._asking, self._silent_s = False, False, 0.0
            self._renew_when_silent_s = self._timeout / 2
        elif before is not None and self._asking:
            self._silent_s += min(now - before, PING_PERIOD_S)
            if self._silent_s >= self._timeout:
                self._fail_all(self._nobody_answers())
            elif self._silent_s >= self._renew_when_silent_s:
                self._lost = True
        if self._tickets and now >= self._ping_at:
            self._ping_at = now + PING_PERIOD_S
            self._asking = True
            self._outgoing.append(self._encoder.encode(Ping()))
        if self._refused and self._retry_at is None:
            self._retry_at = now + RETRY_S
        elif self._retry_at is not None and now >= self._retry_at:
            self._outgoing += [request.encoded(self._encoder) for request in self._refused]
            self._refused.clear()
            self._retry_at = None
        return self._lost and (self._heard_here or now >= self._opened_at + RETRY_S)

    def renewed(self, now: float) -> None:
        """There is a new connection: everything unfinished is submitted again."""
        self._session, self._lost, self._heard_here = None, False, False
        self._opened_at = now
        self._renew_when_silent_s = self._silent_s + self._timeout / 2
        self._refused.clear()
        self._outgoing = [ticket.encoded(self._encoder) for ticket in self._tickets.values()]

    def frames(self) -> list[bytes]:
        """The messages to send now, one a frame; to a connection that is lost, nothing."""
        if self._lost:
            return []
        frames, self._outgoing = self._outgoing, []
        return frames

    def changed(self) -> list[Ticket]:
        """What has got output or its end since the last call; one may be there twice."""
        changed, self._changed = self._changed, []
        return changed

    def wait_s(self, now: float) -> float | None:
        """In how many seconds `advance` is to be called at the latest; None: no need to."""
        due: list[float] = []
        if self._tickets:
            due.append(self._ping_at)
        if self._asking:
            limit = self._timeout if self._lost else self._renew_when_silent_s
            due.append(now + min(limit, self._timeout) - self._silent_s)
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
        ticket = self._tickets.get(str(message.id))
        if isinstance(ticket, Request):
            self._answer(ticket, message)
        elif isinstance(ticket, Inquiry) and isinstance(message, Pong):
            ticket.pong = message
            self._end(ticket)

    def _answer(self, request: Request, message: ServerMessage) -> None:
        if isinstance(message, Accepted):
            request.accept(message.seed)
        elif isinstance(message, WireDelta):
            if request.extend(message):
                self._changed.append(request)
            else:
                self.abandon(request)
                self._fail(request, RequestError("internal", "the stream has a gap or a repeat"))
        elif isinstance(message, Finish):
            request.finish(message)
            self._end(request)
        elif isinstance(message, Error):
            if message.code == "overloaded" and request.waits_for_room():
                self._refused.append(request)
            else:
                self._fail(request, RequestError(message.code, message.message))

    def _refuse_a_frame(self, error: Error) -> None:
        """An error without an id: a frame was larger than the ingress reads. Of the requests that
        it has not answered, that can only be the largest."""
        unanswered = [ticket for ticket in self._tickets.values() if isinstance(ticket, Request)]
        largest = max(unanswered, key=Request.unanswered_size, default=None)
        if largest is None or not largest.unanswered_size():
            log.error("%s: %s: %s", self._endpoint, error.code, error.message)
        else:
            self._fail(largest, RequestError(error.code, error.message))

    def _end(self, ticket: Ticket) -> None:
        self._tickets.pop(str(ticket.message.id), None)
        self._changed.append(ticket)

    def _fail(self, ticket: Ticket, failure: Exception) -> None:
        ticket.failure = failure
        self._end(ticket)

    def _fail_all(self, message: str) -> None:
        for ticket in list(self._tickets.values()):
            self._fail(ticket, PipelineUnavailable(message))
        self._refused.clear()
        self._lost = True  # what waits in the connection is for nobody

    def _nobody_answers(self) -> str:
        if self._heard_ever:
            return (
                f"the pipeline at {self._endpoint} is gone: it has not answered for"
                f" {self._timeout:g} s"
            )
        return (
            f"no pipeline answers at {self._endpoint} (waited {self._timeout:g} s);"
            " start one with `nanovllm-launch`, or name another endpoint"
        )
