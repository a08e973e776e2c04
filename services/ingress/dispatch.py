"""Which tokenizer has which request, and what must be submitted again when a service died.

An attempt waits here until a tokenizer has room, is tokenized and handed on to the scheduler, and
is admitted there. Until then it can be lost with either of them, and is handed out again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from nanovllm.links import Peer
from nanovllm.messages import Cancel, IngressToTokenizer
from nanovllm.services.ingress.requests import Request, Stage

# Requests in the hands of one tokenizer: enough to keep it busy; what dies with it is little.
WINDOW = 64
# A request that was handed on but not admitted for so long has been lost on the way.
ADMISSION_TIMEOUT_S = 5.0


class Outbox:
    """What a tokenizer has in hand, and what it is to be sent."""

    def __init__(self) -> None:
        self.in_hand: dict[int, Request] = {}
        self.messages: list[IngressToTokenizer] = []


class Dispatcher:
    """Hands requests to tokenizers, first come first served, to the one with the least in hand."""

    def __init__(self) -> None:
        self.tokenizers: dict[Peer, Outbox] = {}
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
        self._leave(request)
        request.stage = Stage.OVER
        self._hand_out()

    def withdraw(self, request: Request) -> None:
        """Nobody needs it any more, wherever it is."""
        tokenizer = self._leave(request)
        if tokenizer is not None:
            tokenizer.messages.append(Cancel(request.uid))
        request.stage = Stage.OVER
        self._hand_out()

    def handed_on(self, request: Request, now: float) -> None:
        """The tokenizer has given it to the scheduler."""
        if request.stage is Stage.TOKENIZING:
            self._leave(request)
            request.stage = Stage.HANDED_ON
            self._unadmitted[request.uid] = (request, now + ADMISSION_TIMEOUT_S)
            self._hand_out()

    def admitted(self, request: Request) -> None:
        """The scheduler has it, whether or not the tokenizer has said so."""
        self._leave(request)
        request.stage = Stage.ADMITTED
        request.tokenizer = None
        self._hand_out()

    def tokenizer_up(self, peer: Peer) -> None:
        self.tokenizers[peer] = Outbox()
        self._hand_out()

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

    def _leave(self, request: Request) -> Outbox | None:
        """Takes the request out of where it stands; returns the tokenizer that had it in hand."""
        if request.stage is Stage.WAITING:
            self._waiting.pop(request.uid, None)
        elif request.stage is Stage.HANDED_ON:
            self._unadmitted.pop(request.uid, None)
        elif request.stage is Stage.TOKENIZING and request.tokenizer in self.tokenizers:
            outbox = self.tokenizers[request.tokenizer]
            outbox.in_hand.pop(request.uid, None)
            return outbox
        return None

    def _hand_out(self) -> None:
        while self._waiting and self.tokenizers:
            peer = min(self.tokenizers, key=lambda p: len(self.tokenizers[p].in_hand))
            outbox = self.tokenizers[peer]
            if len(outbox.in_hand) >= WINDOW:
                return
            _, request = self._waiting.popitem(last=False)
            request.stage = Stage.TOKENIZING
            request.tokenizer = peer
            outbox.in_hand[request.uid] = request
            outbox.messages.append(request.tokenize())
