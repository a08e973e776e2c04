"""The ingress without its sockets: all unfinished requests, from arrival to delivery.

The loop hands bytes and messages to the methods, and sends what `sessions`, `tokenizers`,
`engines` and `detokenizers` have to send.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sized
from typing import NamedTuple

from nanovllm.control import IngressStats
from nanovllm.messages import (
    Decoded,
    EngineState,
    Lost,
    Refused,
    SchedulerToIngress,
    TokenizerToIngress,
)
from nanovllm.protocol import Abort, Error, ErrorCode, Generate, Ping, Pong
from nanovllm.services.ingress.client_queues import ClientQueues
from nanovllm.services.ingress.detokenizers import Detokenizers
from nanovllm.services.ingress.engine import Queue
from nanovllm.services.ingress.engines import EnginePool
from nanovllm.services.ingress.frames import Limits
from nanovllm.services.ingress.output import size_of
from nanovllm.services.ingress.pending import PendingRequests
from nanovllm.services.ingress.quarantine import Quarantine
from nanovllm.services.ingress.requests import Request
from nanovllm.services.ingress.sessions import Session, Sessions
from nanovllm.services.ingress.timeline import Timeline
from nanovllm.services.ingress.tokenizers import Tokenizers
from nanovllm.tracing import Tracer
from nanovllm.transport.links import Peer
from nanovllm.wording import counted

log = logging.getLogger(__name__)

# A wake-up handles so many client messages at most, or so many bytes of them: to decode 8 MiB can
# take half a second. More would delay streams, and requests that a tokenizer has answered.
MESSAGES_PER_WAKE_UP = 16
BYTES_PER_WAKE_UP = 1 << 20
# Of all client queues.
MAX_QUEUED_BYTES = 512 << 20


class About(NamedTuple):
    """Facts about the server for pongs."""

    version: str
    model: str


class Core:
    """All sessions and unfinished requests.

    Args:
        incarnation: this process's; session names and uids begin with it.
        limits: bounds for the keys of requests.
        max_pending_requests: how many unfinished requests are held at most.
        max_num_batched_tokens: the token budget of an engine's step.
        about: facts for pongs.
        draw_seed: draws the seed of a request that brings none.
        clock: tells the time in ns; asked for requests alone whose timings are wanted.
        tracer: takes the spans; None where nothing is traced.

    Attributes:
        sessions: the clients, and the frames for them.
        tokenizers, engines: the requests that each has, and the messages for each.
        detokenizers: what they know, and the messages for each.
        quarantine: the requests that may bring services down.
    """

    def __init__(
        self,
        incarnation: int,
        limits: Limits,
        max_pending_requests: int,
        max_num_batched_tokens: int,
        about: About,
        draw_seed: Callable[[], int],
        clock: Callable[[], int],
        tracer: Tracer | None = None,
    ) -> None:
        self.tokenizers = Tokenizers()
        self.engines = EnginePool(max_num_batched_tokens)
        self.detokenizers = Detokenizers(self.engines)
        self.sessions = Sessions(incarnation)
        self._about = about
        self._clock = clock
        self._tracer = tracer
        self._pending = PendingRequests(incarnation, max_pending_requests, draw_seed)
        self._client_queues = ClientQueues(limits)
        self._queue = Queue()
        self._draining = False
        self.quarantine = Quarantine(
            self._pending.by_uid, self.tokenizers, self._queue, self.engines, self._poison
        )

    @property
    def ready(self) -> bool:
        """Whether a request could start now."""
        services_up = bool(self.tokenizers) and bool(self.detokenizers)
        return services_up and self.engines.ready and not self._draining

    @property
    def stats(self) -> IngressStats:
        return IngressStats(len(self.sessions), len(self._pending.by_uid), self._pending.finished)

    def drain(self) -> None:
        """From now on new requests are refused as `shutting_down`, except requests that resume."""
        self._draining = True

    @property
    def drains(self) -> bool:
        return self._draining

    @property
    def drained(self) -> bool:
        """Whether it drains, and every request has ended."""
        return self._draining and not self._pending.by_uid and not self.sessions.unsent

    # Clients ------------------------------------------------------------------------------------

    def receive(self, connection: bytes, frame: bytes | None) -> None:
        """Queues a client's ZeroMQ message for `work`. None stands for a message that was not one
        frame."""
        self._client_queues.add(self.sessions.of(connection), frame)

    def flooded(self) -> bytes | None:
        """If the client queues are too large, closes the session with the largest queue, and
        returns the connection to end."""
        if self._client_queues.size <= MAX_QUEUED_BYTES:
            return None
        session = self._client_queues.largest()
        log.warning("session %s sends more than can be taken in: disconnected", session.name)
        self.closed(session.connection)
        return session.connection

    @property
    def has_work(self) -> bool:
        """Whether client queues hold messages."""
        return bool(self._client_queues)

    def work(self) -> None:
        """Handles some of the messages in the client queues."""
        taken = self._client_queues.take(MESSAGES_PER_WAKE_UP, BYTES_PER_WAKE_UP)
        for session, message, size in taken:
            if isinstance(message, Generate):
                self._generate(session, message, size)
            elif isinstance(message, Abort):
                self._abort(session, message)
            elif isinstance(message, Ping):
                self.sessions.answer(session, self._pong(session, message))
            else:
                self.sessions.answer(session, message)

    def closed(self, connection: bytes) -> None:
        """The client has gone, and its requests with it."""
        session = self.sessions.close(connection)
        if session is None:
            return
        self._client_queues.drop(session)
        for request in session.requests.values():
            self._forget(request)

    def sent(self, session: Session) -> None:
        """The session's outgoing frame was sent."""
        for request in session.sent():
            del session.requests[request.id]
            self._forget(request)

    # Services -----------------------------------------------------------------------------------

    def service_up(self, peer: Peer) -> None:
        """A connection to the service was made."""
        self.quarantine.connected(peer)
        if peer.role == "tokenizer":
            self.tokenizers.up(peer)
        elif peer.role == "detokenizer":
            self.detokenizers.up(peer)
        elif peer.role == "scheduler" and (lost := self.engines.up(peer)):
            log.warning("%s is a new one, and takes over %s", peer, _requests(lost))
            self.quarantine.put_back(lost)

    def service_down(self, peer: Peer) -> None:
        """The connection to the service is gone."""
        if peer in self.tokenizers:
            in_hand = self.tokenizers.in_hand(peer)
            if in_hand.uids:
                log.warning("%s is gone; it had %s in hand", peer, _requests(in_hand.uids))
            else:
                log.info("%s is gone; it had nothing in hand", peer)
            # Before `down`, which must know the requests that have to be alone.
            self.quarantine.lost(peer, in_hand)
            self.tokenizers.down(peer)
        elif (engine := self.engines.of(peer)) is not None:
            self.quarantine.lost(peer, engine.in_hand)
            self.quarantine.put_back(self.engines.down(engine))
            self.quarantine.fail_over()
        self.detokenizers.down(peer)

    def from_tokenizer(self, peer: Peer, message: TokenizerToIngress) -> None:
        self.tokenizers.answered(peer, message.uid)
        request = self._pending.by_uid.get(message.uid)
        if request is None or request.over or request.tokenize is None:
            return
        if isinstance(message, Refused):
            self._refuse(request, message.code, message.message)
            return
        self._pending.tokenized(request, message)
        if request.stream:
            self.sessions.answer(request.session, request.accepted())
        self._queue.add(request)

    def from_scheduler(self, peer: Peer, message: SchedulerToIngress) -> None:
        if (engine := self.engines.of(peer)) is None:
            return
        if isinstance(message, EngineState):
            self.engines.state(engine, message)
            self.quarantine.fail_over()
        elif isinstance(message, Lost):
            self.quarantine.reported(peer.engine, message)
        elif count := engine.missing(message):
            log.warning("%s missed %s, submitted again", peer, counted(count, "request"))

    def from_detokenizer(self, decoded: Decoded) -> None:
        request = self._pending.by_uid.get(decoded.uid)
        if request is None or request.over or decoded.attempt != request.attempt:
            return
        if not request.output.add(decoded):
            log.error(
                "request %x: output from token %d and character %d does not go on from token %d",
                decoded.uid,
                decoded.token_offset,
                decoded.text_offset,
                request.output.num_tokens,
            )
            return
        if request.timeline is not None and decoded.timings is not None:
            request.timeline.decoded(decoded.timings)
        if (ending := decoded.ending) is not None:
            if ending.reason == "not_finite":
                message = "the model's logits are not finite (NaN or inf)"
                request.outcome = Error(id=request.id, code="internal", message=message)
            elif ending.reason == "no_token":
                message = (
                    f"sampling: after {request.output.num_tokens} output tokens, the parameters"
                    " (logit_bias, min_tokens, bad_words, allowed_token_ids, structured_outputs)"
                    " leave no token"
                )
                request.outcome = Error(id=request.id, code="invalid_request", message=message)
            elif ending.reason == "too_costly":
                message = (
                    f"sampling.structured_outputs: after {request.output.num_tokens} output tokens"
                    " the grammar takes too much work"
                )
                request.outcome = Error(id=request.id, code="invalid_request", message=message)
            else:
                request.finish(ending.reason, ending.usage)
            self._over(request)
        elif self.quarantine.suspects.records:  # output may clear a suspect
            self.quarantine.moved(request)
        self.sessions.has_news(request, size_of(decoded))

    def vacate(self, engine: int, leaves: bool) -> None:
        """An engine is about to be stopped: others get its requests."""
        self.quarantine.put_back(self.engines.stop(engine, leaves))
        self.quarantine.fail_over()

    def forget(self, engine: int) -> None:
        """An engine has left for good, unless it is connected."""
        self.quarantine.put_back(self.engines.forget(engine))
        self.quarantine.fail_over()

    def submit(self) -> None:
        """Gives the engines requests from the queue, as far as they take them."""
        self.quarantine.submit()
        while (request := self._queue.first()) is not None:
            if (engine := self.engines.route(request)) is None:
                return
            self._queue.take(request)
            engine.give(request)

    # ---------------------------------------------------------------------------------------------

    def _generate(self, session: Session, ask: Generate, size: int) -> None:
        if (refusal := self._refusal(session, ask, size)) is not None:
            self.sessions.answer(session, refusal)
            return
        request = self._pending.begin(session, ask, size)
        request.timeline = self._timeline(ask)
        self.tokenizers.add(request)

    def _timeline(self, ask: Generate) -> Timeline | None:
        parent = None if self._tracer is None else self._tracer.parent(ask.traceparent)
        if parent is not None and not parent.sampled:
            parent = None
        if parent is None and not ask.timings:
            return None
        return Timeline(self._clock, parent, wanted=ask.timings)

    def _refusal(self, session: Session, ask: Generate, size: int) -> Error | None:
        code: ErrorCode = "overloaded"
        if ask.id in session.requests:
            code = "duplicate_id"
            reason = "id: an unfinished request of this session has it"
        elif self._draining and not ask.resume_token_ids:
            code = "shutting_down"
            reason = "the pipeline is shutting down; try later"
        elif (overload := self._pending.overload(session, size)) is not None:
            reason = overload
        else:
            return None
        return Error(id=ask.id, code=code, message=reason)

    def _abort(self, session: Session, message: Abort) -> None:
        request = session.requests.get(message.id)
        if request is None or request.outcome is not None:
            return
        request.finish("abort", request.usage_so_far())
        self._over(request)
        self.sessions.has_news(request)

    def _pong(self, session: Session, ping: Ping) -> Pong:
        return Pong(
            id=ping.id,
            session=session.name,
            version=self._about.version,
            model=self._about.model,
            ready=self.ready,
        )

    def _poison(self, request: Request, role: str) -> None:
        log.error("request %x is set aside: it brings down the %s", request.uid, role)
        reason = f"the {role} died again and again with nothing but this request in hand"
        self._refuse(request, "poisoned", reason)

    def _refuse(self, request: Request, code: ErrorCode, reason: str) -> None:
        """Ends an accepted request with an error."""
        request.outcome = Error(id=request.id, code=code, message=reason)
        self._over(request)
        self.sessions.has_news(request)

    def _over(self, request: Request) -> None:
        """The request has its outcome, or its client has gone: no service goes on with it."""
        request.over = True
        if request.timeline is not None:
            request.timeline.end()
        if request.tokenize is not None:
            self.tokenizers.discard(request)
        self._queue.discard(request)
        self.engines.end(request)
        self.quarantine.moved(request)

    def _forget(self, request: Request) -> None:
        """The request's outcome was sent, or its client has gone."""
        if not request.over:
            self._over(request)
        self._pending.forget(request)
        if self._tracer is not None and (spans := request.spans()):
            self._tracer.add(spans)


def _requests(requests: Sized) -> str:
    return counted(len(requests), "request")
