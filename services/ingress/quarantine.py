"""Quarantine of requests that may bring services down: one of them at a time runs alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

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
    requests of its own. But an engine and the detokenizers work on all requests at once. There a
    suspect is alone only if all other requests are taken back, and wait in the queue.

    Args:
        requests: all unfinished requests, by uid.
        tokenizers, queue, engines: where the requests are.
        poison: called with a guilty request, and the role of the service that died.

    Attributes:
        suspects: suspects of deaths of other services than tokenizers.
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
        self._requests = requests
        self._tokenizers = tokenizers
        self._queue = queue
        self._engines = engines
        self._poison = poison
        self._deaths = Deaths()

    # The two halves of a death ------------------------------------------------------------------

    def connected(self, peer: Peer) -> None:
        """The link to a service was made: what it had in hand before does not count any more."""
        self._deaths.lost(peer, NOTHING_IN_HAND)

    def lost(self, peer: Peer, in_hand: InHand) -> None:
        """The link to a service is gone."""
        known = self._deaths.lost(peer, in_hand)
        if known is not None:
            self._suspect(peer, known)

    def reported(self, lost: Lost) -> None:
        """The scheduler's link to a service is gone."""
        self.lost(Peer.of(lost.service, lost.incarnation), lost.in_hand)

    def crashed(self, peer: Peer) -> None:
        """The supervisor says that this incarnation of a service died by itself."""
        in_hand = self._deaths.by_itself(peer)
        if in_hand is not None:
            self._suspect(peer, in_hand)

    # Suspects -----------------------------------------------------------------------------------

    def moved(self, request: Request) -> None:
        """A request has new output, or is over. Both can clear it."""
        if not self.suspects.records:
            return
        if request.over:
            self.suspects.forget(request.uid)
        elif not self.suspects.got_to(request.uid, request.output.num_tokens):
            return
        if request is self._queue.only:  # any other changes nothing for the one that runs alone
            self._isolate()

    def _suspect(self, peer: Peer, in_hand: InHand) -> None:
        """A service died by itself, and had these requests in hand."""
        suspects = self._tokenizers.suspects if peer.role == "tokenizer" else self.suspects
        present = [self._requests[uid] for uid in in_hand.uids if uid in self._requests]
        requests = counted(len(in_hand.uids), "request")
        log.warning("%s died by itself with %s in hand", peer, requests)
        for request in present:
            if not request.over and suspects.was_present(
                request.uid, request.output.num_tokens, alone=in_hand.alone
            ):
                self._poison(request, peer.role)
        self._isolate()

    def _isolate(self) -> None:
        """Lets the next suspect run alone, and takes all other requests back. Without a suspect
        all requests go on."""
        uid = self.suspects.next()
        alone = None if uid is None else self._requests[uid]
        if alone is self._queue.only:
            return
        self._queue.only = alone
        if alone is None:
            log.warning("all requests go on")
            return
        log.warning("request %x runs alone: it may be what brings services down", alone.uid)
        others = [request for request in self._engines.all_given() if request is not alone]
        for request in others:
            self._engines.end(request)
        self._queue.put_back(others)
