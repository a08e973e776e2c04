"""Quarantine of requests that may bring services down: one of them at a time runs alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from nanovllm.messages import NOTHING_IN_HAND, InHand, Lost
from nanovllm.services.ingress.engine import Queue
from nanovllm.services.ingress.engines import EnginePool
from nanovllm.services.ingress.requests import Request
from nanovllm.services.ingress.suspects import Deaths, Suspects
from nanovllm.services.ingress.tokenizers import Tokenizers
from nanovllm.transport.links import Peer
from nanovllm.wording import counted

log = logging.getLogger(__name__)


class Quarantine:
    """Keeps suspects apart from other requests.

    A suspect of tokenizers' deaths is kept apart by `Tokenizers`, since a tokenizer has a few
    requests of its own. But an engine works on all its requests at once. So a suspect runs on an
    engine that is given nothing else, if possible one that has just started. The other engines go
    on. Detokenizers are shared by all engines: a suspect of their deaths runs while no engine has
    another request.

    Args:
        requests: all unfinished requests, by uid.
        tokenizers, queue, engines: where the requests are.
        poison: called with a guilty request, and the role of the service that died.

    Attributes:
        suspects: suspects of deaths of other services than tokenizers.
        alone: the suspect that runs alone, or is the next to do so.
    """

    def __init__(
        self,
        requests: Mapping[int, Request],
        tokenizers: Tokenizers,
        queue: Queue,
        engines: EnginePool,
        poison: Callable[[Request, str], None],
    ) -> None:
        self.suspects = Suspects()
        self.alone: Request | None = None
        # The suspects that must be alone and that no engine has; they are not in the queue.
        self._aside: dict[int, Request] = {}
        # The detokenizers that have had no output but of `alone`.
        self._alone_with: set[Peer] = set()
        self._requests = requests
        self._tokenizers = tokenizers
        self._queue = queue
        self._engines = engines
        self._poison = poison
        self._deaths = Deaths()

    # The two halves of a death ------------------------------------------------------------------

    def connected(self, peer: Peer) -> None:
        """The link to a service was made: what it had in hand before does not count any more."""
        self._deaths.lost(peer, NOTHING_IN_HAND, peer.engine)
        if peer.role == "detokenizer" and self._engines.halted:
            self._alone_with.add(peer)

    def lost(self, peer: Peer, in_hand: InHand) -> None:
        """The link to a service is gone."""
        self._lost(peer, in_hand, peer.engine)

    def reported(self, engine: int, lost: Lost) -> None:
        """A scheduler's link to a service is gone."""
        peer, in_hand = Peer.of(lost.service, lost.incarnation), lost.in_hand
        if peer.role == "detokenizer" and len(self._engines.by_number) > 1:
            # Its scheduler knows nothing of what other engines gave the detokenizer.
            in_hand = InHand(in_hand.uids, in_hand.alone and peer in self._alone_with)
        self._lost(peer, in_hand, engine)

    def crashed(self, peer: Peer) -> None:
        """The supervisor says that this incarnation of a service died by itself."""
        for in_hand in self._deaths.by_itself(peer):
            self._suspect(peer, in_hand)

    # Suspects -----------------------------------------------------------------------------------

    def moved(self, request: Request) -> None:
        """A request has new output, or is over. Both can clear it."""
        if request.over:  # a guilty one has no record any more
            self.suspects.forget(request.uid)
            self._aside.pop(request.uid, None)
        elif not self.suspects.got_to(request.uid, request.output.num_tokens):
            return
        if request is self.alone:  # any other changes nothing for the one that runs alone
            self._isolate()
        elif request.uid in self._aside:
            self._queue.put_back([self._aside.pop(request.uid)])

    def put_back(self, requests: Iterable[Request]) -> None:
        """Requests that an engine had wait for another one."""
        others: list[Request] = []
        for request in requests:
            if self.suspects.must_be_alone(request.uid):
                self._aside[request.uid] = request
            else:
                others.append(request)
        self._queue.put_back(others)

    def fail_over(self) -> None:
        """Engines have come or gone: requests of those that are gone go to others. A request that
        was in hand at two deaths stays until it is known why both services died."""
        gone = [number for number, engine in self._engines.by_number.items() if not engine.ready]
        unexplained = {number: self._deaths.unexplained(number) for number in gone}

        def stays(uid: int, engine: int) -> bool:
            again = self.suspects.has_deaths(uid)
            return any(
                uid in uids for number, uids in unexplained.items() if again or number != engine
            )

        if strays := self._engines.take_strays(stays):
            log.warning("%s of engines that are gone go to others", counted(len(strays), "request"))
            self.put_back(strays)

    def submit(self) -> None:
        """Gives the suspect whose turn it is to an engine that it has alone."""
        request = self.alone
        if request is None or request.engine is not None:
            return
        self._reserve(request)
        engine = self._engines.reserved
        if engine is not None and engine.ready:
            log.warning("request %x runs alone: it may bring services down", request.uid)
            del self._aside[request.uid]
            engine.give(request)

    def _reserve(self, alone: Request) -> None:
        """Keeps an engine for the suspect, and takes back what is in its way."""
        engine = self._engines.for_one_alone()
        if engine is not None:
            halt = self.suspects.records[alone.uid].shared
            self.put_back(self._engines.reserve(engine, alone, halt))

    def _lost(self, peer: Peer, in_hand: InHand, told_by: int) -> None:
        known = self._deaths.lost(peer, in_hand, told_by)
        if known is not None:
            self._suspect(peer, known)

    def _suspect(self, peer: Peer, in_hand: InHand) -> None:
        """A service died by itself, and had these requests in hand."""
        suspects = self._tokenizers.suspects if peer.role == "tokenizer" else self.suspects
        present = [self._requests[uid] for uid in in_hand.uids if uid in self._requests]
        if peer.role == "tokenizer":  # another may have answered since
            present = [request for request in present if request.tokenize is not None]
        requests = counted(len(in_hand.uids), "request")
        log.warning("%s died by itself with %s in hand", peer, requests)
        shared = peer.role == "detokenizer"
        for request in present:
            if not request.over and suspects.was_present(
                request.uid, request.output.num_tokens, alone=in_hand.alone, shared=shared
            ):
                self._poison(request, peer.role)
        if suspects is self.suspects:
            self._isolate()

    def _isolate(self) -> None:
        """Sets apart the suspects that must be alone, and chooses the one to run. Those that need
        not be alone any more go on."""
        apart = self.suspects.apart()
        for cleared in [r for r in self._aside.values() if r.uid not in apart]:
            del self._aside[cleared.uid]
            self._queue.put_back([cleared])
        chosen = self.suspects.next()
        alone = None if chosen is None else self._requests[chosen]
        # What runs alone goes on, and so it is where there is no other engine.
        goes_on = (alone is not None and alone.engine is not None) and (
            alone is self.alone or len(self._engines.by_number) == 1
        )
        for uid in apart - self._aside.keys():
            if uid != chosen or not goes_on:
                request = self._aside[uid] = self._requests[uid]
                self._queue.discard(request)
                self._engines.end(request)
        if alone is self.alone:
            return
        self.alone = alone
        self._alone_with.clear()
        if alone is None:
            log.warning("all requests go on")
            self._engines.release()
        else:
            self._reserve(alone)
