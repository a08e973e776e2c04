"""What is done about requests that may bring services down: one of them at a time runs alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import numpy as np

from nanovllm.messages import Lost
from nanovllm.services.ingress.dispatch import Dispatcher
from nanovllm.services.ingress.requests import Request, Stage, begun
from nanovllm.services.ingress.suspects import NOTHING, Deaths, InHand, Suspects
from nanovllm.transport.links import Peer
from nanovllm.wording import counted

log = logging.getLogger(__name__)


class Quarantine:
    """Keeps suspects apart. Of deaths of tokenizers the dispatcher does it: each has its own few
    requests. All that comes after the tokenizers works on everything at once, so there a suspect is
    alone only if all others are taken back, and wait here.

    Args:
        requests: all that are unfinished, by uid.
        dispatcher: lets them through.
        poison: called with a request that is guilty, and the role of what died.

    Attributes:
        recalls: attempts, by uid, that the scheduler is to be told not to run.
        suspects: of deaths of what comes after the tokenizers.
    """

    def __init__(
        self,
        requests: Mapping[int, Request],
        dispatcher: Dispatcher,
        poison: Callable[[Request, str], None],
    ) -> None:
        self.recalls: dict[int, int] = {}
        self.suspects = Suspects()
        self._requests = requests
        self._dispatcher = dispatcher
        self._poison = poison
        self._deaths = Deaths()
        self._alone: Request | None = None
        # Whether nothing but `_alone` can have come to this life of the scheduler.
        self._scheduler_is_fresh = False

    # Halves of a death --------------------------------------------------------------------------

    def connected(self, life: Peer) -> None:
        """The link to a service is there: what it had in hand before says nothing any more."""
        self._deaths.lost(life, NOTHING)

    def lost(self, life: Peer, in_hand: InHand) -> None:
        """The link to a service is gone."""
        known = self._deaths.lost(life, in_hand)
        if known is not None:
            self._suspect(life, known)

    def reported(self, lost: Lost) -> None:
        """The scheduler's link to a service is gone."""
        uids = frozenset(np.frombuffer(lost.uids, "<i8").tolist())
        life = Peer(lost.role, lost.index, lost.incarnation)
        self.lost(life, InHand(uids, lost.others))

    def crashed(self, life: Peer) -> None:
        """The supervisor: this life of a service ended for a reason of its own."""
        in_hand = self._deaths.by_itself(life)
        if in_hand is not None:
            self._suspect(life, in_hand)

    def scheduler_up(self, peer: Peer, reborn: bool) -> None:
        self.connected(peer)
        if reborn:
            self.recalls.clear()
            self._scheduler_is_fresh = self._alone is not None

    def scheduler_down(self, peer: Peer) -> None:
        uids = frozenset(request.uid for request in begun(self._requests.values()))
        self.lost(peer, InHand(uids, others=not self._scheduler_is_fresh))

    # Suspects -----------------------------------------------------------------------------------

    def moved(self, request: Request) -> None:
        """A request has new output, or is over: both can clear it. While there are no suspects it
        need not be told."""
        if request.outcome is not None or request.stage is Stage.OVER:
            self.suspects.forget(request.uid)
        elif not self.suspects.got_to(request.uid, request.output.num_tokens):
            return
        self._isolate()

    def _suspect(self, life: Peer, in_hand: InHand) -> None:
        """A service died by itself, and had these in hand."""
        suspects = self._dispatcher.suspects if life.role == "tokenizer" else self.suspects
        there = [self._requests[uid] for uid in in_hand.uids if uid in self._requests]
        requests = counted(len(in_hand.uids), "request")
        log.warning("%s died by itself with %s in hand", life, requests)
        for request in there:
            if request.outcome is None and suspects.was_there(
                request.uid, request.output.num_tokens, alone=in_hand.alone
            ):
                self._poison(request, life.role)
        self._isolate()

    def _isolate(self) -> None:
        """Lets the next suspect run alone, and takes all others back; or lets all go on."""
        uid = self.suspects.next()
        alone = None if uid is None else self._requests[uid]
        if alone is self._alone:
            return
        self._alone = alone
        self._scheduler_is_fresh = False
        self._dispatcher.only = alone
        if alone is not None:
            log.warning("request %x runs alone: it may be what brings services down", alone.uid)
            others = [request for request in begun(self._requests.values()) if request is not alone]
            self.recalls |= {r.uid: r.attempt for r in others if r.may_be_scheduled}
            self._dispatcher.submit_again(others)
        else:
            log.warning("all requests go on")
            self._dispatcher.submit_again(())
