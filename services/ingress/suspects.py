"""Suspects: requests that may bring services down.

A request that was in hand when a service died by itself is a suspect. After `DEATHS` such deaths
the suspect runs alone, while other requests wait. If the service dies `DEATHS_ALONE` times with the
suspect alone, the suspect is guilty. A suspect that gets further than it was at the death, or is
over, is cleared. So a guilty request costs a bounded number of deaths, however many other requests
there are. And no request is found guilty for another: a death counts as alone only if the service
certainly had no other request in hand.

Two messages tell of a death, in any order. The service that gave out the requests says which were
in hand. The supervisor, which alone sees how a process ends, says that the service died by itself.
Without the second message, as after a kill from outside, no request is suspected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nanovllm.messages import InHand
from nanovllm.names import ENGINE_ROLES, ServiceId
from nanovllm.transport.links import Peer

# After so many deaths in company a request runs alone; after so many alone it is guilty.
DEATHS: Final = 2
DEATHS_ALONE: Final = 2
# So many tokens beyond the output known at a death clear a request: tokens that were on their way
# then are no progress. Twice as many each time that the request is suspected again.
CLEARING_TOKENS: Final = 16


class Deaths:
    """Joins the two messages about a death. Of each service the latest are kept."""

    def __init__(self) -> None:
        # The requests in hand, by the engine that has told of them.
        self._in_hand: dict[ServiceId, dict[int, tuple[int, InHand]]] = {}
        self._by_itself: dict[ServiceId, int] = {}

    def lost(self, peer: Peer, in_hand: InHand, told_by: int = 0) -> InHand | None:
        """The link to a service is gone. Returns `in_hand` if the service is known to have died by
        itself. When the same incarnation makes the link again, this is called with
        `NOTHING_IN_HAND`, since the requests in hand before do not count any more.

        Args:
            told_by: the engine whose requests these are: each tells of a detokenizer.
        """
        known = self._in_hand.setdefault(peer.service, {})
        if not in_hand.uids:
            if told_by in known and known[told_by][0] == peer.incarnation:
                del known[told_by]
            return None
        if self._by_itself.get(peer.service) == peer.incarnation:
            return in_hand
        known[told_by] = (peer.incarnation, in_hand)
        return None

    def by_itself(self, peer: Peer) -> list[InHand]:
        """The service died by itself. Returns the requests it had in hand, of each engine that has
        told of them; `lost` returns those of the others."""
        self._by_itself[peer.service] = peer.incarnation
        known = self._in_hand.get(peer.service, {})
        told_by = [engine for engine, (number, _) in known.items() if number == peer.incarnation]
        return [known.pop(engine)[1] for engine in told_by]

    def unexplained(self, engine: int) -> set[int]:
        """The requests that a service of the engine had in hand when it went, where the supervisor
        has not said that the service died by itself."""
        return {
            uid
            for service, known in self._in_hand.items()
            if service.role in ENGINE_ROLES and service.engine == engine
            for _, in_hand in known.values()
            for uid in in_hand.uids
        }


@dataclass(slots=True)
class Record:
    """What speaks against a request."""

    deaths: int = 0  # when the request was in hand
    alone: int = 0  # of these, when no other request was in hand
    shared: bool = False  # whether one of these was a detokenizer's
    tokens: int = 0  # output tokens at the latest death
    clearings: int = 0  # how often the request has been cleared


class Suspects:
    """The suspects of tokenizers' deaths, or of the other services' deaths.

    Attributes:
        records: the record of each suspect, by uid.
    """

    def __init__(self) -> None:
        self.records: dict[int, Record] = {}

    def was_present(self, uid: int, tokens: int, *, alone: bool, shared: bool = False) -> bool:
        """The request was in hand at a death, with so many output tokens. Returns whether the
        request is guilty. If it is, other requests are suspects only if they were alone once.

        Args:
            shared: whether it was the death of a service that all engines share.
        """
        record = self.records.setdefault(uid, Record())
        record.deaths += 1
        record.alone += alone
        record.shared |= shared
        record.tokens = tokens
        guilty = record.alone >= DEATHS_ALONE
        if guilty:
            del self.records[uid]
            self.records = {other: r for other, r in self.records.items() if r.alone}
        return guilty

    def must_be_alone(self, uid: int) -> bool:
        record = self.records.get(uid)
        return record is not None and record.deaths >= DEATHS

    def has_deaths(self, uid: int) -> bool:
        """Whether the request was in hand at a death and has not been cleared since."""
        record = self.records.get(uid)
        return record is not None and record.deaths > 0

    def apart(self) -> set[int]:
        """The requests that must be alone."""
        return {uid for uid, record in self.records.items() if record.deaths >= DEATHS}

    def next(self) -> int | None:
        """The request that is to run alone now: the suspect with the most deaths. Among equals the
        latest, since the last request before a death is its likeliest reason."""
        ranked = ((r.deaths, uid) for uid, r in self.records.items() if r.deaths >= DEATHS)
        return max(ranked, default=(0, None))[1]

    def got_to(self, uid: int, tokens: int) -> bool:
        """The request has so many output tokens now. Returns whether that clears the request."""
        record = self.records.get(uid)
        if record is None or not record.deaths:
            return False
        if tokens < record.tokens + (CLEARING_TOKENS << record.clearings):
            return False
        record.deaths = record.alone = 0
        record.shared = False
        record.clearings += 1
        return True

    def forget(self, uid: int) -> None:
        """The request is over, or its service has answered."""
        self.records.pop(uid, None)
