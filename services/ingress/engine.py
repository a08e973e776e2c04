"""Which requests an engine has, and which wait for one.

The queue of requests is here, and not in the scheduler. A scheduler is given requests for its slots
and a few more, so that a new scheduler is sent little, and the order is decided in one place.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from nanovllm.messages import (
    NOTHING_IN_HAND,
    End,
    EngineState,
    Held,
    IngressToScheduler,
    InHand,
    Missing,
    pack,
    pack_int64,
    unpack_int64,
    unpack_list,
)
from nanovllm.services.ingress.cached_blocks import CachedBlocks
from nanovllm.services.ingress.load import Load
from nanovllm.services.ingress.requests import Request
from nanovllm.services.ingress.turns import Turns
from nanovllm.transport.links import Peer, one_frame

# Beyond its slots, a scheduler is given so many requests, or as many as fill the token budgets of
# so many steps with their prompts, whichever is more.
WAITING_REQUESTS = 32
WAITING_BUDGETS = 2


class Queue:
    """Requests in token ids that no engine has. Those that an engine has had and that have output
    go first: their clients wait for the next token. (Output that a client brought does not count:
    it may say what it likes.)
    """

    def __init__(self) -> None:
        self._running = Turns()
        self._new = Turns()

    def add(self, request: Request) -> None:
        """Adds a request that has just been tokenized."""
        self._new.add(request)

    def put_back(self, requests: Iterable[Request]) -> None:
        """Adds requests that an engine had."""
        requests = list(requests)
        self._running.put_back(r for r in requests if r.output.num_tokens > r.resumed)
        self._new.put_back(r for r in requests if r.output.num_tokens <= r.resumed)

    def take(self, request: Request) -> None:
        """An engine is given the request."""
        self._part(request).take(request)

    def discard(self, request: Request) -> None:
        """The request is over."""
        self._part(request).discard(request.uid)

    def first(self) -> Request | None:
        """The request whose turn it is."""
        return self._running.first() or self._new.first()

    def _part(self, request: Request) -> Turns:
        return self._running if request.uid in self._running else self._new


class Engine:
    """The requests that one engine was given, and the outbox of its scheduler.

    A link loses messages only around an `Up`. So on each `Up` the outbox is emptied, and `Held` is
    sent first. `Held` names all requests that this incarnation of the scheduler was sent. The
    scheduler answers with the requests that are missing, which are submitted again.

    Args:
        number: the engine's.
        max_num_batched_tokens: the token budget of a step.

    Attributes:
        peer: the scheduler; None while there is no link to it.
        given: unfinished requests that the scheduler was given, by uid.
        load: the work of these requests.
        cached: the blocks in its prefix cache.
        fresh: whether the engine is ready, and was given nothing since it became so.
        stops: whether it is about to be stopped: it is given nothing until it has started anew.
        leaves: whether it is not to start anew.
    """

    def __init__(self, number: int, max_num_batched_tokens: int) -> None:
        self._number = number
        self.peer: Peer | None = None
        self.given: dict[int, Request] = {}
        self.load = Load()
        self.cached = CachedBlocks()
        self.fresh = False
        self.stops = False
        self.leaves = False
        self._most_waiting_tokens = WAITING_BUDGETS * max_num_batched_tokens
        self._state = EngineState(False, 0, 0, 0)
        self._incarnation = 0
        # How many requests this incarnation was given, finished ones included.
        self._ever_given = 0
        # The latest of `given`, for which there is no slot, and their prompt tokens.
        self._waiting: dict[int, Request] = {}
        self._waiting_tokens = 0
        # The outbox.
        self._held: Held | None = None
        self._ends: dict[int, int] = {}
        self._submits: dict[int, Request] = {}

    @property
    def ready(self) -> bool:
        """Whether a request could start now."""
        return self.peer is not None and self._state.ready and not self.stops

    @property
    def block_size(self) -> int:
        return self._state.block_size

    @property
    def endpoint(self) -> str:
        """Where the scheduler binds; empty before it has said so."""
        return self._state.endpoint

    def takes(self, request: Request) -> bool:
        """Whether the engine is to be given this request now."""
        if not self.ready:
            return False
        return (
            len(self.given) < self._state.slots
            or len(self._waiting) < WAITING_REQUESTS
            or self._waiting_tokens + request.prompt_tokens <= self._most_waiting_tokens
        )

    def lacks(self, request: Request) -> int:
        """How many tokens of prompt and output the engine would have to compute."""
        tokens = request.prompt_tokens + request.output.num_tokens
        if request.block_names is None:
            return tokens
        return tokens - self._state.block_size * self.cached.count(request.block_names)

    def give(self, request: Request) -> None:
        """Submits the request, as its next attempt."""
        request.next_attempt(self._number)
        request.engine = self
        self.fresh = False
        self._ever_given += 1
        self.load.add(request, self.lacks(request))
        if request.block_names is not None:
            self.cached.add(request.block_names, self._state.blocks)
        if len(self.given) >= self._state.slots:
            self._waiting[request.uid] = request
            self._waiting_tokens += request.prompt_tokens
        self.given[request.uid] = self._submits[request.uid] = request

    def end(self, request: Request) -> None:
        """Takes the request back, if the engine has it."""
        if self.given.pop(request.uid, None) is None:
            return
        request.engine = None
        self.load.remove(request.uid)
        if request.block_names is not None:
            request.name_blocks(self._state.block_size)
            self.cached.add(request.block_names, self._state.blocks)
        # The first waiting request has a slot now.
        first = request.uid if request.uid in self._waiting else next(iter(self._waiting), None)
        if first is not None:
            self._waiting_tokens -= self._waiting.pop(first).prompt_tokens
        if self._submits.pop(request.uid, None) is None:
            self._ends[request.uid] = request.attempt

    @property
    def in_hand(self) -> InHand:
        """The requests in hand of the scheduler."""
        if self.peer is None:
            return NOTHING_IN_HAND
        return InHand(list(self.given), alone=self._ever_given == len(self.given) == 1)

    def up(self, peer: Peer) -> list[Request]:
        """A connection to the scheduler was made. Returns the requests that the engine does not
        have any more: none, or after a restart of the scheduler all."""
        lost: list[Request] = []
        if peer.incarnation != self._incarnation:
            lost = list(self.given.values())
            for request in lost:
                self.end(request)
            self._ever_given = 0
            self.cached.clear()
            self.stops = self.leaves = False
        self.peer = peer
        self._incarnation = peer.incarnation
        self._ends.clear()
        sent = [request for uid, request in self.given.items() if uid not in self._submits]
        uids = pack_int64(request.uid for request in sent)
        self._held = Held(uids, pack(request.attempt for request in sent))
        return lost

    def down(self) -> None:
        self.peer = None
        self.fresh = False
        self._state = msgspec.structs.replace(self._state, ready=False)

    def state(self, state: EngineState) -> None:
        if state.ready != self._state.ready:
            self.fresh = state.ready and not self.given
            self.stops = self.stops and not state.ready
            self.cached.clear()
        self._state = state

    def missing(self, message: Missing) -> int:
        """Submits again the requests that did not arrive; returns how many."""
        attempts = unpack_list(message.attempts)
        count = 0
        for uid, attempt in sorted(zip(unpack_int64(message.uids), attempts, strict=True)):
            request = self.given.get(uid)
            if request is not None and request.attempt == attempt:
                request.next_attempt(self._number)
                self._submits[uid] = request
                count += 1
        return count

    def frame(self) -> list[IngressToScheduler]:
        """The next frame for the scheduler; empty if there is none. Call `sent` once it is sent."""
        if self.peer is None:
            return []
        held: list[IngressToScheduler] = [] if self._held is None else [self._held]
        ends = (End(uid, attempt) for uid, attempt in self._ends.items())
        submits = one_frame(self._submits.values(), lambda r: r.size + len(r.output.tokens))
        return [*held, *ends, *(request.submit() for request in submits)]

    def sent(self, frame: list[IngressToScheduler]) -> None:
        """The latest frame was sent."""
        self._held = None
        self._ends.clear()
        for message in frame:
            if not isinstance(message, Held | End):
                del self._submits[message.uid]
