"""Which tokenizer has which request.

A tokenizer is a function of the request: a request whose tokenizer dies is given to another, and
the first answer counts, from whichever tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator

from nanovllm.messages import NOTHING_IN_HAND, InHand, Tokenize
from nanovllm.services.ingress.requests import Request
from nanovllm.services.ingress.suspects import Suspects
from nanovllm.services.ingress.turns import Turns
from nanovllm.transport.links import Peer, one_frame

# Requests in the hands of one tokenizer: enough to keep it busy, and little to do again.
WINDOW = 64


class _Tokenizer:
    """The requests that one tokenizer has in hand, and those of them that were not sent yet. A
    request that is over stays in hand until the tokenizer answers, since the tokenizer works on it.
    """

    def __init__(self) -> None:
        self.in_hand: dict[int, Request] = {}
        self.unsent: dict[int, Request] = {}


class Tokenizers:
    """Gives requests to tokenizers, in turns. A request goes to the tokenizer with the fewest
    requests in hand.

    Attributes:
        suspects: the suspects of deaths of tokenizers. A suspect that must be alone goes to a
            tokenizer with nothing in hand. That tokenizer gets no other request until it answers.
    """

    def __init__(self) -> None:
        self.suspects = Suspects()
        self._tokenizers: dict[Peer, _Tokenizer] = {}
        self._waiting = Turns()

    def __bool__(self) -> bool:
        """Whether there is a tokenizer."""
        return bool(self._tokenizers)

    def __contains__(self, peer: Peer) -> bool:
        return peer in self._tokenizers

    def add(self, request: Request) -> None:
        self._waiting.add(request)
        self._hand_out()

    def discard(self, request: Request) -> None:
        """The request is over. A tokenizer that was sent the request still answers it."""
        self._withdraw(request.uid)
        self._hand_out()

    def answered(self, peer: Peer, uid: int) -> None:
        """The tokenizer has answered. The request may be over, or answered before."""
        self._withdraw(uid)
        if peer in self._tokenizers:
            self._tokenizers[peer].in_hand.pop(uid, None)
        self._hand_out()

    def up(self, peer: Peer) -> None:
        self._tokenizers[peer] = _Tokenizer()
        self._hand_out()

    def down(self, peer: Peer) -> None:
        """The tokenizer is gone. Other tokenizers get the requests that it had in hand."""
        in_hand = self._tokenizers.pop(peer).in_hand
        self._waiting.put_back(r for r in in_hand.values() if r.tokenize and not r.over)
        self._hand_out()

    def in_hand(self, peer: Peer) -> InHand:
        if peer not in self._tokenizers:
            return NOTHING_IN_HAND
        uids = list(self._tokenizers[peer].in_hand)
        return InHand(uids, alone=len(uids) == 1)

    def frames(self) -> Iterator[tuple[Peer, list[Tokenize]]]:
        """The next frame for each tokenizer that has unsent requests. Call `sent` for each frame
        that was sent."""
        for peer, tokenizer in self._tokenizers.items():
            if tokenizer.unsent:
                unsent = one_frame(tokenizer.unsent.values(), lambda request: request.size)
                yield peer, [request.tokenize for request in unsent if request.tokenize]

    def sent(self, peer: Peer, frame: list[Tokenize]) -> None:
        for tokenize in frame:
            del self._tokenizers[peer].unsent[tokenize.uid]

    def _withdraw(self, uid: int) -> None:
        """Sends the request to no tokenizer any more."""
        self._waiting.discard(uid)
        for tokenizer in self._tokenizers.values():
            if tokenizer.unsent.pop(uid, None) is not None:
                del tokenizer.in_hand[uid]
        self.suspects.forget(uid)

    def _hand_out(self) -> None:
        while (request := self._waiting.first()) is not None:
            peer = min(
                filter(self._takes_more, self._tokenizers),
                key=lambda peer: len(self._tokenizers[peer].in_hand),
                default=None,
            )
            if peer is None:
                return
            tokenizer = self._tokenizers[peer]
            if tokenizer.in_hand and self.suspects.must_be_alone(request.uid):
                return  # wait for a tokenizer with nothing in hand; no other request overtakes
            self._waiting.take(request)
            tokenizer.in_hand[request.uid] = tokenizer.unsent[request.uid] = request

    def _takes_more(self, peer: Peer) -> bool:
        in_hand = self._tokenizers[peer].in_hand
        if self.suspects.records and any(map(self.suspects.must_be_alone, in_hand)):
            return False
        return len(in_hand) < WINDOW
