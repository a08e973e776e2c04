"""Which requests bring services down, told apart from those that were only present.

A request that was in hand when a service died for a reason of its own is a suspect. After `DEATHS`
such deaths the request runs alone, while others wait; if the service dies twice with it alone, the
request is guilty. A request that gets further than it was at the death, or is over, is cleared. So
a guilty request costs a bounded number of deaths, however many others there are, and no request is
found guilty for another: a death counts as alone only where it is certain that the service had
nothing else in hand.

What is known of a death comes in two halves, in any order: what was in hand, from the service that
gave out the requests, and whether the death was by itself, from the supervisor, which alone knows
how a process ended. Without the second half, as after a kill from outside, nothing is suspected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nanovllm.messages import NOTHING_IN_HAND, InHand
from nanovllm.transport.links import Peer

# Deaths in company after which a request runs alone, and alone after which it is guilty.
DEATHS: Final = 2
DEATHS_ALONE: Final = 2
# Output beyond what was known at a death that clears a request: tokens that were on their way then
# are not to be taken for progress. Twice as many each time that it is suspected again.
CLEARING_TOKENS: Final = 16


class Deaths:
    """Joins the two halves. The latest of each are kept for each service."""

    def __init__(self) -> None:
        self._in_hand: dict[tuple[str, int], tuple[int, InHand]] = {}
        self._by_itself: dict[tuple[str, int], int] = {}

    def lost(self, peer: Peer, in_hand: InHand) -> InHand | None:
        """The link to a service is gone. Returns `in_hand` if the service is known to have died by
        itself. When the link is made again, this is called with `NOTHING_IN_HAND`, since the
        requests in hand before do not count any more."""
        service = (peer.role, peer.index)
        if not in_hand.uids:
            self._in_hand.pop(service, None)
            return None
        if self._by_itself.get(service) == peer.incarnation:
            del self._by_itself[service]
            return in_hand
        self._in_hand[service] = (peer.incarnation, in_hand)
        return None

    def by_itself(self, peer: Peer) -> InHand | None:
        """A service died for a reason of its own: returns what it had in hand, if that is known."""
        service = (peer.role, peer.index)
        incarnation, in_hand = self._in_hand.get(service, (0, NOTHING_IN_HAND))
        if incarnation == peer.incarnation:
            del self._in_hand[service]
            return in_hand
        self._by_itself[service] = peer.incarnation
        return None


@dataclass(slots=True)
class Record:
    """What speaks against a request."""

    deaths: int = 0  # at which it was in hand
    alone: int = 0  # of these, with nothing else in hand
    tokens: int = 0  # output tokens that it had at the latest
    clearings: int = 0  # how often it has been cleared


class Suspects:
    """The suspects of services that do the same: tokenizers, or all that comes after them.

    Attributes:
        records: of each, by uid.
    """

    def __init__(self) -> None:
        self.records: dict[int, Record] = {}

    def was_present(self, uid: int, tokens: int, *, alone: bool) -> bool:
        """The request, with so many output tokens, was in hand at a death; returns whether it is
        guilty. Then others, but for those that were alone once, are suspects no more: they were
        only present."""
        record = self.records.setdefault(uid, Record())
        record.deaths += 1
        record.alone += alone
        record.tokens = tokens
        guilty = record.alone >= DEATHS_ALONE
        if guilty:
            del self.records[uid]
            self.records = {other: r for other, r in self.records.items() if r.alone}
        return guilty

    def must_be_alone(self, uid: int) -> bool:
        record = self.records.get(uid)
        return record is not None and record.deaths >= DEATHS

    def next(self) -> int | None:
        """The request that is to run alone now: the one with the most deaths, and of these the
        latest, since what came last before a death is the likeliest reason."""
        ranked = ((r.deaths, uid) for uid, r in self.records.items() if r.deaths >= DEATHS)
        return max(ranked, default=(0, None))[1]

    def got_to(self, uid: int, tokens: int) -> bool:
        """The request has so many output tokens now; returns whether that clears it."""
        record = self.records.get(uid)
        if record is None or not record.deaths:
            return False
        if tokens < record.tokens + (CLEARING_TOKENS << record.clearings):
            return False
        record.deaths = record.alone = 0
        record.clearings += 1
        return True

    def forget(self, uid: int) -> None:
        """The request got through, or is over."""
        self.records.pop(uid, None)
