"""Which tokenizer has which request, and what must be submitted again when a service died.

An attempt waits here until a tokenizer has room, is tokenized and handed on to the scheduler, and
is admitted there. Until then it can be lost with either of them, and is handed out again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import takewhile

from nanovllm.messages import Cancel, IngressToTokenizer
from nanovllm.services.ingress.requests import Request, Stage
from nanovllm.services.ingress.suspects import NOTHING, InHand, Suspects
from nanovllm.transport.links import Peer

# Requests in the hands of one tokenizer: enough to keep it busy; what dies with it is little.
WINDOW = 64
# A request that was handed on but not admitted for so long has been lost on the way.
ADMISSION_TIMEOUT_S = 5.0


class Outbox:
    """What a tokenizer has in hand, in the order in which it works, and what it is to be sent."""

    def __init__(self) -> None:
        self.in_hand: dict[int, Request] = {}
        self.messages: list[IngressToTokenizer] = []
        # While it may be at one that was taken back: those that it was given before that one.
        self._ahead: set[int] | None = None

    def take_back(self, request: Request) -> None:
        """It is not to do this one. It may be doing it now."""
        ahead = set(takewhile(lambda uid: uid != request.uid, self.in_hand))
        del self.in_hand[request.uid]
        self._ahead = (ahead | (self._ahead or set())) & self.in_hand.keys()
        self.messages.append(Cancel(request.uid))

    def done(self, request: Request) -> None:
        """It has done this one, and with it all that it was given before."""
        del self.in_hand[request.uid]
        if self._ahead is not None and request.uid not in self._ahead:
            self._ahead = None

    @property
    def held(self) -> InHand:
        return InHand(frozenset(self.in_hand), others=self._ahead is not None)


class Dispatcher:
    """Hands requests to tokenizers, first come first served, to the one with the least in hand.

    Attributes:
        suspects: of deaths of tokenizers. One that must be alone is given to a tokenizer that has
            nothing else in hand, and gets nothing else until it is through.
        only: the one request that is let through; None: all are.
    """

    def __init__(self) -> None:
        self.tokenizers: dict[Peer, Outbox] = {}
        self.suspects = Suspects()
        self.only: Request | None = None
        self._waiting: OrderedDict[int, Request] = OrderedDict()
        # Handed on and not admitted, with the time by which they should be; earliest first.
        self._unadmitted: dict[int, tuple[Request, float]] = {}

    def submit(self, request: Request) -> None:
        """Takes in a new request."""
        request.attempt = 1
        self._waiting[request.uid] = request
        self._hand_out()

    def submit_again(self, requests: Iterable[Request]) -> None:
        """Starts a new attempt of each, in the order in which they came at first."""
        for request in requests:
            self._leave(request)
            request.attempt += 1
            request.stage = Stage.WAITING
            self._waiting[request.uid] = request
        self._waiting = OrderedDict(sorted(self._waiting.items()))
        self._hand_out()

    def over(self, request: Request) -> None:
        """It has ended by itself."""
        self._leave(request, done=True)
        request.stage = Stage.OVER
        self._hand_out()

    def withdraw(self, request: Request) -> None:
        """Nobody needs it any more, wherever it is."""
        self._leave(request)
        self.suspects.forget(request.uid)
        request.stage = Stage.OVER
        self._hand_out()

    def handed_on(self, request: Request, now: float) -> None:
        """The tokenizer has given it to the scheduler."""
        if request.stage is Stage.TOKENIZING:
            self._leave(request, done=True)
            request.stage = Stage.HANDED_ON
            self._unadmitted[request.uid] = (request, now + ADMISSION_TIMEOUT_S)
            self._hand_out()

    def admitted(self, request: Request) -> None:
        """The scheduler has it, whether or not the tokenizer has said so."""
        self._leave(request, done=True)
        request.stage = Stage.ADMITTED
        request.tokenizer = None
        self._hand_out()

    def tokenizer_up(self, peer: Peer) -> None:
        self.tokenizers[peer] = Outbox()
        self._hand_out()

    def in_hand(self, peer: Peer) -> InHand:
        """What a tokenizer has in hand."""
        return self.tokenizers[peer].held if peer in self.tokenizers else NOTHING

    def tokenizer_down(self, peer: Peer) -> None:
        """What it had in hand, or may have had on the way to the scheduler, starts anew."""
        outbox = self.tokenizers.pop(peer)
        on_the_way = [r for r, _ in self._unadmitted.values() if r.tokenizer == peer]
        self.submit_again([*outbox.in_hand.values(), *on_the_way])

    def scheduler_connected(self) -> None:
        """What was on the way to the scheduler while the link to it was down may be lost."""
        self.submit_again([request for request, _ in self._unadmitted.values()])

    def submit_lost(self, now: float) -> None:
        """Starts anew what should have been admitted by now."""
        lost: list[Request] = []
        for request, deadline in self._unadmitted.values():
            if deadline > now:
                break
            lost.append(request)
        if lost:
            self.submit_again(lost)

    @property
    def next_deadline(self) -> float | None:
        """When `submit_lost` next has something to do."""
        return next((deadline for _, deadline in self._unadmitted.values()), None)

    def unsent(self) -> Iterator[tuple[Peer, list[IngressToTokenizer]]]:
        """What each tokenizer is to be sent; the lists are cleared by whoever sent them."""
        for peer, outbox in self.tokenizers.items():
            if outbox.messages:
                yield peer, outbox.messages

    def _leave(self, request: Request, *, done: bool = False) -> None:
        """Takes the request out of where it stands; `done`: it came through there."""
        if request.stage is Stage.WAITING:
            self._waiting.pop(request.uid, None)
        elif request.stage is Stage.HANDED_ON:
            self._unadmitted.pop(request.uid, None)
        elif request.stage is Stage.TOKENIZING and request.tokenizer in self.tokenizers:
            outbox = self.tokenizers[request.tokenizer]
            if done:
                outbox.done(request)
            else:
                outbox.take_back(request)
        if done:
            self.suspects.forget(request.uid)

    def _hand_out(self) -> None:
        while (request := self._first()) is not None:
            peer = min(
                filter(self._takes_more, self.tokenizers),
                key=lambda p: len(self.tokenizers[p].in_hand),
                default=None,
            )
            if peer is None:
                return
            outbox = self.tokenizers[peer]
            if outbox.in_hand and self.suspects.must_be_alone(request.uid):
                return  # until one has nothing in hand; nothing else is given out meanwhile
            del self._waiting[request.uid]
            request.stage = Stage.TOKENIZING
            request.tokenizer = peer
            outbox.in_hand[request.uid] = request
            outbox.messages.append(request.tokenize())

    def _first(self) -> Request | None:
        """Who is to be handed out next."""
        if self.only is not None:
            return self._waiting.get(self.only.uid)
        return next(iter(self._waiting.values()), None)

    def _takes_more(self, peer: Peer) -> bool:
        in_hand = self.tokenizers[peer].in_hand
        if self.suspects.records and any(map(self.suspects.must_be_alone, in_hand)):
            return False
        return len(in_hand) < WINDOW
