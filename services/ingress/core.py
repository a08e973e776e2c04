"""The ingress without its sockets: who asked what, who has it, and what was delivered.

Bytes and messages go in by the methods; what is to be sent stands in `unsent` (clients),
`dispatcher.unsent()` (tokenizers) and `ends` (the scheduler) until the loop has sent it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from nanovllm.control import IngressStats
from nanovllm.messages import (
    Delta,
    EngineState,
    HandedOn,
    Lost,
    SchedulerToIngress,
    TokenizerToIngress,
)
from nanovllm.protocol import (
    Abort,
    Accepted,
    Error,
    ErrorCode,
    Generate,
    Ping,
    Pong,
    Usage,
)
from nanovllm.services.ingress.client_queues import ClientQueues
from nanovllm.services.ingress.dispatch import Dispatcher
from nanovllm.services.ingress.frames import Limits
from nanovllm.services.ingress.output import size_of
from nanovllm.services.ingress.quarantine import Quarantine
from nanovllm.services.ingress.requests import Request, Stage, begun
from nanovllm.services.ingress.sessions import Session
from nanovllm.transport.links import Peer
from nanovllm.wording import counted

log = logging.getLogger(__name__)

# Client messages handled in one wake-up, so that thousands stop nobody's stream; and no more
# after so many bytes, of which 8 MiB can take half a second.
MESSAGES_PER_WAKE_UP = 128
BYTES_PER_WAKE_UP = 1 << 20
# A client that does not read is treated as one that has gone: when its socket has taken nothing for
# so long, as if a heartbeat had not been answered (none can be sent while its buffers are full), or
# when so much is kept for it.
MAX_FULL_S = 1.2
MAX_UNREAD_BYTES = 16 << 20
# Unfinished requests are held whole, to be submitted again: so many at most, and so many bytes.
MAX_REQUEST_BYTES = 1 << 30
# Of all client queues.
MAX_QUEUED_BYTES = 512 << 20


class About(NamedTuple):
    """What a pong tells of the server."""

    version: str
    model: str


class Core:
    """All sessions and unfinished requests.

    Args:
        incarnation: this process's; session names and uids begin with it.
        limits: what a request may be.
        max_pending_requests: how many are held at most.
        about: for pongs.
        draw_seed: for requests that bring none.

    Attributes:
        quarantine: the requests that may be what brings services down.
        ends: uids that the scheduler is to be told nobody needs any more.
        unsent: sessions that have something to send.
    """

    def __init__(
        self,
        incarnation: int,
        limits: Limits,
        max_pending_requests: int,
        about: About,
        draw_seed: Callable[[], int],
    ) -> None:
        self.dispatcher = Dispatcher()
        self.ends: set[int] = set()
        self.unsent: set[Session] = set()
        self._incarnation = incarnation
        self._limits = limits
        self._max_pending_requests = max_pending_requests
        self._about = about
        self._draw_seed = draw_seed
        self._sessions: dict[bytes, Session] = {}
        self._sessions_opened = 0
        self._requests: dict[int, Request] = {}
        self.quarantine = Quarantine(self._requests, self.dispatcher, self._poison)
        self._requests_begun = 0
        self._request_bytes = 0
        self._finished = 0
        self._queues = ClientQueues(limits)
        self._detokenizers: set[Peer] = set()
        self._scheduler: Peer | None = None
        self._scheduler_known = False
        self._engine_ready = False
        self._draining = False

    @property
    def ready(self) -> bool:
        """Whether a request could start now."""
        services_up = bool(self.dispatcher.tokenizers) and bool(self._detokenizers)
        engine_up = self._scheduler is not None and self._engine_ready
        return services_up and engine_up and not self._draining

    @property
    def stats(self) -> IngressStats:
        return IngressStats(len(self._sessions), len(self._requests), self._finished)

    def drain(self) -> None:
        """From now on new requests are refused as `overloaded`, and those that go on with output
        that their client has are not."""
        self._draining = True

    @property
    def drains(self) -> bool:
        return self._draining

    @property
    def drained(self) -> bool:
        """Whether it drains, and every request has had its end."""
        return self._draining and not self._requests and not self.unsent

    # Clients ------------------------------------------------------------------------------------

    def receive(self, connection: bytes, frame: bytes | None) -> None:
        """Queues a client's ZeroMQ message for `work`; None is one that was not one frame."""
        self._queues.add(self._sessions.get(connection) or self._open(connection), frame)

    def flooded(self) -> bytes | None:
        """The connection to be ended because the client queues are too large: that of the client
        with the largest queue. Its requests are gone then."""
        if self._queues.size <= MAX_QUEUED_BYTES:
            return None
        session = self._queues.largest()
        log.warning("session %s sends more than can be taken in: disconnected", session.name)
        self.closed(session.connection)
        return session.connection

    @property
    def has_work(self) -> bool:
        """Whether client queues hold messages."""
        return bool(self._queues)

    def work(self) -> None:
        """Handles some of the messages in the client queues."""
        for session, message, size in self._queues.take(MESSAGES_PER_WAKE_UP, BYTES_PER_WAKE_UP):
            if isinstance(message, Generate):
                self._generate(session, message, size)
            elif isinstance(message, Abort):
                self._abort(session, message)
            elif isinstance(message, Ping):
                self._answer(session, self._pong(session, message))
            else:
                self._answer(session, message)

    def closed(self, connection: bytes) -> None:
        """The client has gone, and its requests with it."""
        session = self._sessions.pop(connection, None)
        if session is None:
            return
        self._queues.drop(session)
        self.unsent.discard(session)
        for request in session.requests.values():
            self._forget(request)

    def sent(self, session: Session) -> None:
        """The session's outgoing frame is in its socket."""
        for request in session.sent():
            del session.requests[request.id]
            self._forget(request)

    def full(self, session: Session, now: float) -> bool:
        """The session's socket does not take its outgoing frame; whether it is to be
        disconnected, since it does not read. Its requests are gone then."""
        if session.full_since is None:
            session.full_since = now
        seconds = now - session.full_since
        if seconds < MAX_FULL_S and session.unread_bytes <= MAX_UNREAD_BYTES:
            return False
        log.warning(
            "session %s does not read: nothing for %.1f s, %s wait; it is disconnected, with %s",
            session.name,
            seconds,
            counted(session.unread_bytes, "byte"),
            counted(len(session.requests), "request"),
        )
        self.closed(session.connection)
        return True

    # Services -----------------------------------------------------------------------------------

    def service_up(self, peer: Peer) -> None:
        if peer.role == "tokenizer":
            self.quarantine.connected(peer)
            self.dispatcher.tokenizer_up(peer)
        elif peer.role == "detokenizer":
            self._detokenizers.add(peer)

    def service_down(self, peer: Peer) -> None:
        if peer in self.dispatcher.tokenizers:
            in_hand = self.dispatcher.in_hand(peer)
            if in_hand.uids:
                requests = counted(len(in_hand.uids), "request")
                log.warning("%s is gone; it had %s in hand, to be given out again", peer, requests)
            else:
                log.info("%s is gone; it had nothing in hand", peer)
            self.quarantine.lost(peer, in_hand)
            self.dispatcher.tokenizer_down(peer)
        self._detokenizers.discard(peer)

    def scheduler_up(self, peer: Peer, reborn: bool) -> None:
        """A reborn one has nothing; another may have missed what was on its way."""
        first, self._scheduler_known = not self._scheduler_known, True
        self._scheduler = peer
        self.quarantine.scheduler_up(peer, reborn)
        if not reborn:
            self.dispatcher.scheduler_connected()
            return
        self.ends.clear()
        if again := begun(self._requests.values()):
            if not first:
                requests = counted(len(again), "request")
                log.warning("the scheduler is a new one, and takes over %s", requests)
            self.dispatcher.submit_again(again)

    def scheduler_down(self, peer: Peer) -> None:
        self._scheduler = None
        self._engine_ready = False
        self.quarantine.scheduler_down(peer)

    def from_tokenizer(self, message: TokenizerToIngress, now: float) -> None:
        request = self._latest(message.uid, message.attempt)
        if request is None:
            return
        if isinstance(message, HandedOn):
            request.may_be_scheduled = True
            request.prompt_tokens = message.prompt_tokens
            self.dispatcher.handed_on(request, now)
            if self._scheduler is not None and self._scheduler.incarnation != message.scheduler:
                # To one that is gone: the tokenizer has not noticed yet.
                self.dispatcher.submit_again([request])
            self._accept(request)
            return
        request.outcome = Error(id=request.id, code=message.code, message=message.message)
        self.dispatcher.over(request)
        if self.quarantine.suspects.records:
            self.quarantine.moved(request)
        self._has_news(request)

    def from_scheduler(self, message: SchedulerToIngress) -> None:
        if isinstance(message, EngineState):
            self._engine_ready = message.ready
            return
        if isinstance(message, Lost):
            self.quarantine.reported(message)
            return
        request = self._requests.get(message.uid)
        if request is None or request.stage is Stage.OVER:
            self.ends.add(message.uid)
            return
        request.may_be_scheduled = True
        if request.attempt == message.attempt:
            self._admitted(request)
        else:
            self.quarantine.recalls[message.uid] = message.attempt

    def from_detokenizer(self, delta: Delta) -> None:
        request = self._requests.get(delta.uid)
        if request is None:
            self.ends.add(delta.uid)
            return
        if delta.attempt != request.attempt or request.outcome is not None:
            return
        if request.stage is not Stage.ADMITTED:
            self._admitted(request)
        if not request.output.add(delta):
            log.error(
                "request %x: output from token %d and character %d does not go on from token %d",
                delta.uid,
                delta.token_offset,
                delta.text_offset,
                request.output.num_tokens,
            )
            return
        if delta.ending is not None:
            usage = delta.ending.usage
            request.finish(
                delta.ending.reason,
                Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
            )
            self.dispatcher.over(request)
        if self.quarantine.suspects.records:
            self.quarantine.moved(request)
        self._has_news(request, size_of(delta))

    def submit_lost(self, now: float) -> None:
        """Starts anew what the scheduler should have admitted by now."""
        if self._scheduler is not None:
            self.dispatcher.submit_lost(now)

    @property
    def next_deadline(self) -> float | None:
        """When `submit_lost` next has something to do."""
        return None if self._scheduler is None else self.dispatcher.next_deadline

    # ---------------------------------------------------------------------------------------------

    def _open(self, connection: bytes) -> Session:
        self._sessions_opened += 1
        session = Session(connection, f"{self._incarnation:08x}-{self._sessions_opened}")
        self._sessions[connection] = session
        return session

    def _generate(self, session: Session, ask: Generate, size: int) -> None:
        if (refusal := self._refusal(session, ask, size)) is not None:
            self._answer(session, refusal)
            return
        self._request_bytes += size
        self._requests_begun += 1
        uid = self._incarnation << 32 | self._requests_begun
        seed = self._draw_seed() if ask.sampling.seed is None else ask.sampling.seed
        request = Request(uid, ask, size, seed, self._limits.max_model_len, session)
        session.requests[ask.id] = self._requests[uid] = request
        self.dispatcher.submit(request)

    def _refusal(self, session: Session, ask: Generate, size: int) -> Error | None:
        code: ErrorCode = "overloaded"
        if ask.id in session.requests:
            code = "duplicate_id"
            reason = "id: an unfinished request of this session has it"
        elif self._draining and not ask.resume_token_ids:
            reason = "the pipeline is shutting down; try later"
        elif len(self._requests) >= self._max_pending_requests:
            reason = f"max_pending_requests ({self._max_pending_requests}) are held; try later"
        elif self._request_bytes + size > MAX_REQUEST_BYTES:
            reason = f"{self._request_bytes >> 20} MiB of requests are held; try later"
        else:
            return None
        return Error(id=ask.id, code=code, message=reason)

    def _abort(self, session: Session, message: Abort) -> None:
        request = session.requests.get(message.id)
        if request is None or request.outcome is not None:
            return
        request.finish("abort", request.usage_so_far())
        self._withdraw(request)
        self._has_news(request)

    def _pong(self, session: Session, ping: Ping) -> Pong:
        return Pong(
            id=ping.id,
            session=session.name,
            version=self._about.version,
            model=self._about.model,
            ready=self.ready,
        )

    def _answer(self, session: Session, message: Accepted | Error | Pong) -> None:
        session.answer(message)
        self.unsent.add(session)

    def _has_news(self, request: Request, size: int = 0) -> None:
        request.session.has_news(request, size)
        self.unsent.add(request.session)

    def _latest(self, uid: int, attempt: int) -> Request | None:
        """The unfinished request, if this is its latest attempt."""
        request = self._requests.get(uid)
        if request is None or request.attempt != attempt or request.outcome is not None:
            return None
        return request

    def _accept(self, request: Request) -> None:
        if request.stream and not request.accepted:
            request.accepted = True
            session = request.session
            self._answer(session, Accepted(id=request.id, session=session.name, seed=request.seed))

    def _admitted(self, request: Request) -> None:
        request.may_be_scheduled = True
        self.dispatcher.admitted(request)
        self._accept(request)

    def _forget(self, request: Request) -> None:
        """Frees what is held for it here, and elsewhere in the pipeline."""
        del self._requests[request.uid]
        self._request_bytes -= request.size
        self._finished += 1
        self._withdraw(request)

    def _withdraw(self, request: Request) -> None:
        """Nobody in the pipeline needs to go on with it."""
        if request.stage is not Stage.OVER:
            self.dispatcher.withdraw(request)
        if request.may_be_scheduled:
            self.ends.add(request.uid)
        if self.quarantine.suspects.records:
            self.quarantine.moved(request)

    def _poison(self, request: Request, role: str) -> None:
        log.error("request %x is set aside: it brings down the %s", request.uid, role)
        message = f"the {role} died again and again with nothing but this request in hand"
        request.outcome = Error(id=request.id, code="poisoned", message=message)
        self._withdraw(request)
        self._has_news(request)
