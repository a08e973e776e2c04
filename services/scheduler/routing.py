"""Which detokenizer decodes which output, and what each is to be told.

A sequence is begun with a `Begin` that holds all its output so far; from then on each of its tokens
travels in the `NewTokens` of its step, one message for all. Whatever goes wrong (a send that fails,
a detokenizer that dies) is mended in one way: the sequence is owed a `Begin` again.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanovllm.messages import (
    Begin,
    End,
    Finished,
    NewTokens,
    RowLogprobs,
    SchedulerToDetokenizer,
    pack,
)
from nanovllm.services.scheduler.sequences import NO_SLOT, InHand, Sequence
from nanovllm.services.scheduler.slots import NO_LANE, Indices, Slots
from nanovllm.services.scheduler.steps import Ended, Sampled
from nanovllm.transport.links import Peer

# Beginnings in one frame at most: each may hold a long output.
BEGINS_A_FRAME = 256


class Parcel(NamedTuple):
    """One frame for a detokenizer, and the sequences that it begins."""

    peer: Peer
    messages: list[SchedulerToDetokenizer]
    begun: list[Sequence]


class Lane:
    """One detokenizer, and what it is to be told. Its number is the detokenizer's index.

    Attributes:
        up: whether it is connected.
        blocked: a send has failed, and was not tried again since.
        held: the sequences whose output it decodes.
        had: one that it has had, and `had_others`: whether there were more.
        owed: those that it must be sent a `Begin` of.
        ends: uids that it must be told to forget.
        steps, finished: what is new of sequences that it has begun.
    """

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.up = True
        self.blocked = False
        self.held: dict[int, Sequence] = {}
        self.had: int | None = None
        self.had_others = False
        self.owed: dict[int, Sequence] = {}
        self.ends: dict[int, None] = {}
        self.steps: list[NewTokens] = []
        self.finished: list[Sequence] = []

    @property
    def has_news(self) -> bool:
        return bool(self.steps or self.finished or self.owed or self.ends)


class Router:
    """The detokenizers.

    Args:
        slots: their `lane` column says which sequences are sent each token by itself.
    """

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._lanes: dict[int, Lane] = {}
        self._home: dict[int, Lane] = {}
        # With something to tell, and nobody to tell it to.
        self._homeless: dict[int, Sequence] = {}

    # What happens -------------------------------------------------------------------------------

    def sampled(
        self,
        sampled: Sampled,
        logprobs: list[RowLogprobs],
        sequence_of: Callable[[int], Sequence],
    ) -> None:
        """A step's tokens. `sequence_of` a uid is asked only for those that need a `Begin`."""
        for lane in self._lanes.values():
            rows = (sampled.lanes == lane.peer.index).nonzero()[0]
            if len(rows):
                lane.steps.append(_new_tokens(sampled, rows, logprobs))
        for uid in sampled.uids[sampled.lanes == NO_LANE].tolist():
            self.owe(sequence_of(uid))

    def ended(self, ended: Ended) -> None:
        """A sequence has finished, and all its tokens were told of."""
        if ended.lane == NO_LANE:
            self.owe(ended.sequence)
        else:
            self._lanes[ended.lane].finished.append(ended.sequence)

    def owe(self, sequence: Sequence) -> None:
        """The sequence has output, or an end, that no detokenizer knows of."""
        uid = sequence.uid
        lane = self._home.get(uid)
        if lane is None:
            ups = [lane for lane in self._lanes.values() if lane.up]
            if not ups:
                self._homeless[uid] = sequence
                return
            lane = min(ups, key=lambda lane: len(lane.held))
            self._home[uid] = lane
            lane.held[uid] = sequence
            lane.had_others |= lane.had not in (None, uid)
            lane.had = uid
            lane.ends.pop(uid, None)
        lane.owed[uid] = sequence

    def forget(self, uid: int) -> None:
        """The request is over: nobody waits for its text."""
        self._homeless.pop(uid, None)
        lane = self._home.pop(uid, None)
        if lane is not None:
            del lane.held[uid]
            lane.owed.pop(uid, None)
            lane.ends[uid] = None

    def in_hand(self, peer: Peer) -> InHand:
        """What a detokenizer has. It may have anything that it ever had in hand still."""
        lane = self._lanes.get(peer.index)
        if lane is None or lane.peer != peer:
            return InHand([], others=False)
        return InHand(list(lane.held), lane.had_others)

    # Detokenizers come and go -------------------------------------------------------------------

    def up(self, peer: Peer) -> None:
        """A detokenizer is there, anew or for the first time."""
        lane = self._lanes.get(peer.index)
        if lane is not None and lane.up:
            self.down(lane.peer)
        if lane is None or lane.peer != peer:
            lane = self._lanes[peer.index] = Lane(peer)
        lane.up = True
        lane.blocked = False
        homeless, self._homeless = self._homeless, {}
        for sequence in homeless.values():
            self.owe(sequence)

    def down(self, peer: Peer) -> None:
        """It is gone, or cannot be reached: another takes over. If it comes back in the same life
        it is to forget what it had."""
        lane = self._lanes.get(peer.index)
        if lane is None or lane.peer != peer or not lane.up:
            return
        lane.up = False
        self._stop_streaming(lane)
        lane.steps.clear()
        lane.finished.clear()
        lane.owed.clear()
        held, lane.held = lane.held, {}
        for uid, sequence in held.items():
            lane.ends[uid] = None
            del self._home[uid]
            self.owe(sequence)

    # What there is to send ----------------------------------------------------------------------

    @property
    def blocked(self) -> bool:
        """Whether something waits for a detokenizer that does not keep up."""
        return any(lane.blocked for lane in self._lanes.values() if lane.up)

    def retry(self) -> None:
        for lane in self._lanes.values():
            lane.blocked = False

    def parcels(self) -> list[Parcel]:
        """A frame for each detokenizer that can be told something. What becomes of it must be
        told, by `delivered` or `undelivered`, before anything else."""
        return [
            self._parcel(lane)
            for lane in self._lanes.values()
            if lane.up and not lane.blocked and lane.has_news
        ]

    def delivered(self, parcel: Parcel) -> None:
        lane = self._lanes[parcel.peer.index]
        lane.ends.clear()
        lane.steps.clear()
        lane.finished.clear()
        for sequence in parcel.begun:
            del lane.owed[sequence.uid]
            if sequence.slot != NO_SLOT:
                self._slots.lane[sequence.slot] = lane.peer.index

    def undelivered(self, parcel: Parcel) -> None:
        """The detokenizer does not keep up: it is told later, merged."""
        lane = self._lanes[parcel.peer.index]
        lane.blocked = True
        self._stop_streaming(lane)
        untold = [uid for step in lane.steps for uid in np.frombuffer(step.uids, "<i8").tolist()]
        untold.extend(sequence.uid for sequence in lane.finished)
        lane.steps.clear()
        lane.finished.clear()
        for uid in untold:
            if uid in lane.held:
                lane.owed[uid] = lane.held[uid]

    def _stop_streaming(self, lane: Lane) -> None:
        column = self._slots.lane
        column[column == lane.peer.index] = NO_LANE

    def _parcel(self, lane: Lane) -> Parcel:
        messages: list[SchedulerToDetokenizer] = [End(uid) for uid in lane.ends]
        messages.extend(lane.steps)
        messages.extend(_finished(s) for s in lane.finished)
        begun = list(islice(lane.owed.values(), BEGINS_A_FRAME))
        for sequence in begun:
            messages.append(self._begin(sequence))
            if sequence.finish is not None:
                messages.append(_finished(sequence))
        return Parcel(lane.peer, messages, begun)

    def _begin(self, sequence: Sequence) -> Begin:
        submit = sequence.submit
        return Begin(
            submit.uid,
            submit.attempt,
            output=self._slots.output(sequence),
            resumed=submit.resumed,
            stop=submit.stop,
            prompt_tokens=sequence.prompt_tokens,
            cached_tokens=sequence.cached_tokens or 0,
            token_logprobs=list(sequence.logprobs),
        )


def _finished(sequence: Sequence) -> Finished:
    if sequence.finish is None:
        raise ValueError(f"request {sequence.uid} has not finished")
    return Finished(sequence.uid, sequence.attempt, *sequence.finish)


def _new_tokens(sampled: Sampled, rows: Indices, logprobs: list[RowLogprobs]) -> NewTokens:
    """Of these rows of what was sampled; `logprobs` are those of the whole result."""
    of_these: list[RowLogprobs] = []
    if logprobs:
        place = {row: i for i, row in enumerate(sampled.result_rows[rows].tolist())}
        of_these = [
            RowLogprobs(place[entry.row], entry.logprobs)
            for entry in logprobs
            if entry.row in place
        ]
    return NewTokens(
        uids=_int64(sampled.uids[rows]),
        attempts=pack(sampled.attempts[rows]),
        offsets=pack(sampled.offsets[rows]),
        token_ids=pack(sampled.token_ids[rows]),
        logprob_rows=pack(entry.row for entry in of_these),
        logprobs=[entry.logprobs for entry in of_these],
    )


def _int64(values: NDArray[np.int64]) -> bytes:
    return values.astype("<i8", copy=False).tobytes()
