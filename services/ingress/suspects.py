"""Which requests bring services down, told apart from those that were only there.

Whoever was in hand when a service died for a reason of its own is a suspect. One that was there at
`DEATHS` of them runs alone from then on, while others wait; if the service dies twice with it
alone, the request is guilty. One that gets further than it was at the death, or is over, is
cleared. So a guilty request costs a bounded number of deaths, however many others there are, and
nobody is found guilty for another: a death counts as alone only where nothing else can have been
the reason.

What is known of a death comes in two halves, in any order: who was in hand, from whoever had given
it the requests, and whether it was by itself, from the supervisor, who alone knows how a process
ended. Without the second half, as after a kill from outside, nobody is suspected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from nanovllm.transport.links import Peer

# Deaths in company after which a request runs alone, and alone after which it is guilty.
DEATHS: Final = 2
DEATHS_ALONE: Final = 2
# Output beyond what was known at a death that clears a request: tokens that were on their way then
# are not to be taken for progress. Twice as many each time that it is suspected again.
CLEARING_TOKENS: Final = 16


class InHand(NamedTuple):
    """What a service had in hand when the link to it was lost.

    Attributes:
        uids: the requests.
        others: whether it may have worked on more: requests that have left since.
    """

    uids: frozenset[int]
    others: bool

    @property
    def alone(self) -> bool:
        return len(self.uids) == 1 and not self.others


NOTHING = InHand(frozenset(), others=False)


class Deaths:
    """Joins the two halves. The latest of each are kept for each place of a service."""

    def __init__(self) -> None:
        self._in_hand: dict[tuple[str, int], tuple[int, InHand]] = {}
        self._by_itself: dict[tuple[str, int], int] = {}

    def lost(self, life: Peer, in_hand: InHand) -> InHand | None:
        """The link to a service is gone: returns `in_hand` if it is known to have died by itself.
        To be told `NOTHING` when the link is made again: what was in hand before is outdated."""
        place = (life.role, life.index)
        if not in_hand.uids:
            self._in_hand.pop(place, None)
            return None
        if self._by_itself.get(place) == life.incarnation:
            del self._by_itself[place]
            return in_hand
        self._in_hand[place] = (life.incarnation, in_hand)
        return None

    def by_itself(self, life: Peer) -> InHand | None:
        """A service died for a reason of its own: returns what it had in hand, if that is known."""
        place = (life.role, life.index)
        incarnation, in_hand = self._in_hand.get(place, (0, NOTHING))
        if incarnation == life.incarnation:
            del self._in_hand[place]
            return in_hand
        self._by_itself[place] = life.incarnation
        return None


@dataclass(slots=True)
class Record:
    """What speaks against a request: deaths that it was there at, and alone at; how many output
    tokens it had at the latest; and how often it has been cleared."""

    deaths: int = 0
    alone: int = 0
    tokens: int = 0
    clearings: int = 0


class Suspects:
    """The suspects of services that do the same: tokenizers, or all that comes after them.

    Attributes:
        records: of each, by uid.
    """

    def __init__(self) -> None:
        self.records: dict[int, Record] = {}

    def was_there(self, uid: int, tokens: int, *, alone: bool) -> bool:
        """The request, with so many output tokens, was in hand at a death; returns whether it is
        guilty. Then others, but for those that were alone once, are suspects no more: they were
        only there."""
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
        """Who is to run alone now: who was there most often, and of those the latest; what came
        last before a death is the likeliest reason."""
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
        """It is through, or over."""
        self.records.pop(uid, None)
