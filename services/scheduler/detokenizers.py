"""Which detokenizer decodes which output, and what each is to be told.

A sequence is begun with a `Begin` that holds all its output so far. From then on each of its tokens
travels in the `NewTokens` of its step, one message for all sequences. Whatever goes wrong (a send
that fails, a detokenizer that dies) is mended in one way: a `Begin` of the sequence is pending
again.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from nanovllm.messages import (
    NOTHING_IN_HAND,
    Begin,
    End,
    Finished,
    InHand,
    NewTokens,
    RowLogprobs,
    SchedulerToDetokenizer,
    pack,
    pack_int64,
    unpack_int64,
)
from nanovllm.services.scheduler.sequences import NO_SLOT, Sequence
from nanovllm.services.scheduler.slots import NO_DETOKENIZER, Indices, Slots
from nanovllm.services.scheduler.steps import Ended, Sampled
from nanovllm.transport.links import Peer

# `Begin`s in one frame at most: each may hold a long output.
BEGINS_A_FRAME = 256


class DetokenizerFrame(NamedTuple):
    """One frame for a detokenizer, and the sequences that it begins."""

    peer: Peer
    messages: list[SchedulerToDetokenizer]
    begun: list[Sequence]


class DetokenizerOutbox:
    """What one detokenizer decodes, and what it is to be told."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.up = True
        # A send has failed, and was not tried again since.
        self.blocked = False
        # The sequences whose output it decodes, and how many it was ever given.
        self.held: dict[int, Sequence] = {}
        self.ever_given = 0
        # To be told: attempts to forget, `Begin`s, and what is new of sequences that were begun.
        self.ends: dict[int, int] = {}
        self.pending_begins: dict[int, Sequence] = {}
        self.steps: list[NewTokens] = []
        self.finished: list[Sequence] = []

    @property
    def is_empty(self) -> bool:
        return not (self.steps or self.finished or self.pending_begins or self.ends)


class Detokenizers:
    """The outboxes of all detokenizers, by index.

    Args:
        slots: their `detokenizer` column names the one that has begun the slot's sequence, and is
            sent each new token.
    """

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._outboxes: dict[int, DetokenizerOutbox] = {}
        self._of: dict[int, DetokenizerOutbox] = {}
        # Sequences with something to tell, while there is no detokenizer.
        self._unassigned: dict[int, Sequence] = {}

    # Outputs ------------------------------------------------------------------------------------

    def sampled(
        self,
        sampled: Sampled,
        logprobs: list[RowLogprobs],
        sequence_of: Callable[[int], Sequence],
    ) -> None:
        """A step's tokens. `sequence_of` a uid is asked only for those that need a `Begin`."""
        for index, outbox in self._outboxes.items():
            rows = (sampled.detokenizers == index).nonzero()[0]
            if len(rows):
                outbox.steps.append(_new_tokens(sampled, rows, logprobs))
        for uid in sampled.uids[sampled.detokenizers == NO_DETOKENIZER].tolist():
            self.begin(sequence_of(uid))

    def finish(self, ended: Ended) -> None:
        """A sequence has finished, and all its tokens were told of."""
        if ended.detokenizer == NO_DETOKENIZER:
            self.begin(ended.sequence)
        else:
            self._outboxes[ended.detokenizer].finished.append(ended.sequence)

    def begin(self, sequence: Sequence) -> None:
        """The sequence has output, or an end, that no detokenizer knows of."""
        uid = sequence.uid
        outbox = self._of.get(uid)
        if outbox is None:
            up = [outbox for outbox in self._outboxes.values() if outbox.up]
            if not up:
                self._unassigned[uid] = sequence
                return
            outbox = self._of[uid] = min(up, key=lambda outbox: len(outbox.held))
            outbox.held[uid] = sequence
            outbox.ever_given += 1
        outbox.pending_begins[uid] = sequence

    def end(self, sequence: Sequence) -> None:
        """Nothing is to be decoded of this attempt any more."""
        uid = sequence.uid
        self._unassigned.pop(uid, None)
        outbox = self._of.pop(uid, None)
        if outbox is not None:
            del outbox.held[uid]
            outbox.pending_begins.pop(uid, None)
            outbox.ends[uid] = sequence.attempt

    def in_hand(self, peer: Peer) -> InHand:
        """What a detokenizer has. It may still be at work on any output that it was ever given."""
        outbox = self._outboxes.get(peer.index)
        if outbox is None or outbox.peer != peer:
            return NOTHING_IN_HAND
        return InHand(list(outbox.held), alone=len(outbox.held) == outbox.ever_given == 1)

    # Detokenizers come and go -------------------------------------------------------------------

    def up(self, peer: Peer) -> None:
        """A connection to a detokenizer was made, which makes it forget what it had."""
        outbox = self._outboxes.get(peer.index)
        if outbox is not None and outbox.up:
            self.down(outbox.peer)
        if outbox is None or outbox.peer != peer:
            outbox = self._outboxes[peer.index] = DetokenizerOutbox(peer)
        outbox.up = True
        outbox.blocked = False
        unassigned, self._unassigned = self._unassigned, {}
        for sequence in unassigned.values():
            self.begin(sequence)

    def down(self, peer: Peer) -> None:
        """The connection to a detokenizer is gone: another takes over."""
        outbox = self._outboxes.get(peer.index)
        if outbox is None or outbox.peer != peer or not outbox.up:
            return
        outbox.up = False
        self._stop_streaming(outbox)
        outbox.ends.clear()
        outbox.steps.clear()
        outbox.finished.clear()
        outbox.pending_begins.clear()
        held, outbox.held = outbox.held, {}
        for uid, sequence in held.items():
            del self._of[uid]
            self.begin(sequence)

    # What there is to send ----------------------------------------------------------------------

    @property
    def blocked(self) -> bool:
        """Whether something waits for a detokenizer that does not keep up."""
        return any(outbox.blocked for outbox in self._outboxes.values() if outbox.up)

    def retry(self) -> None:
        for outbox in self._outboxes.values():
            outbox.blocked = False

    def frames(self) -> list[DetokenizerFrame]:
        """A frame for each detokenizer that can be told something. What becomes of a frame must be
        told, by `delivered` or `undelivered`, before anything else."""
        return [
            self._frame(outbox)
            for outbox in self._outboxes.values()
            if outbox.up and not outbox.blocked and not outbox.is_empty
        ]

    def delivered(self, frame: DetokenizerFrame) -> None:
        outbox = self._outboxes[frame.peer.index]
        outbox.ends.clear()
        outbox.steps.clear()
        outbox.finished.clear()
        for sequence in frame.begun:
            del outbox.pending_begins[sequence.uid]
            if sequence.slot != NO_SLOT:
                self._slots.detokenizer[sequence.slot] = frame.peer.index

    def undelivered(self, frame: DetokenizerFrame) -> None:
        """The detokenizer does not keep up: it is told later, merged."""
        outbox = self._outboxes[frame.peer.index]
        outbox.blocked = True
        self._stop_streaming(outbox)
        untold = [uid for step in outbox.steps for uid in unpack_int64(step.uids)]
        untold.extend(sequence.uid for sequence in outbox.finished)
        outbox.steps.clear()
        outbox.finished.clear()
        for uid in untold:
            if uid in outbox.held:
                outbox.pending_begins[uid] = outbox.held[uid]

    def _stop_streaming(self, outbox: DetokenizerOutbox) -> None:
        column = self._slots.detokenizer
        column[column == outbox.peer.index] = NO_DETOKENIZER

    def _frame(self, outbox: DetokenizerOutbox) -> DetokenizerFrame:
        messages: list[SchedulerToDetokenizer] = [
            End(uid, attempt) for uid, attempt in outbox.ends.items()
        ]
        messages.extend(outbox.steps)
        messages.extend(_finished(s) for s in outbox.finished)
        begun = list(islice(outbox.pending_begins.values(), BEGINS_A_FRAME))
        for sequence in begun:
            messages.append(self._begin(sequence))
            if sequence.finish is not None:
                messages.append(_finished(sequence))
        return DetokenizerFrame(outbox.peer, messages, begun)

    def _begin(self, sequence: Sequence) -> Begin:
        submit = sequence.submit
        return Begin(
            submit.uid,
            submit.attempt,
            output=self._slots.output(sequence),
            resumed=submit.resumed,
            stop=submit.sampling.stop,
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
        row_of = {row: i for i, row in enumerate(sampled.result_rows[rows].tolist())}
        of_these = [
            RowLogprobs(row_of[entry.row], entry.logprobs)
            for entry in logprobs
            if entry.row in row_of
        ]
    return NewTokens(
        uids=pack_int64(sampled.uids[rows]),
        attempts=pack(sampled.attempts[rows]),
        offsets=pack(sampled.offsets[rows]),
        token_ids=pack(sampled.token_ids[rows]),
        logprob_rows=pack(entry.row for entry in of_these),
        logprobs=[entry.logprobs for entry in of_these],
    )
