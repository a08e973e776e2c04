"""Which detokenizer decodes which output, and the outbox of each detokenizer.

A detokenizer is sent a `Begin` of a sequence first, with all output so far. From then on each new
token of the sequence travels in the `NewTokens` of its step, one message for all sequences. If a
send fails, or a detokenizer dies, a `Begin` of the sequence is pending again.
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
    TextOptions,
    pack,
    pack_int64,
    unpack_int64,
)
from nanovllm.services.scheduler.sequences import NO_SLOT, Sequence
from nanovllm.services.scheduler.slots import NO_DETOKENIZER, Indices, Slots
from nanovllm.services.scheduler.steps import Ended, Sampled, logprobs_of
from nanovllm.transport.links import Peer

# `Begin`s in one frame at most: each may hold a long output.
BEGINS_A_FRAME = 256


class DetokenizerFrame(NamedTuple):
    """The next frame for a detokenizer."""

    peer: Peer
    messages: list[SchedulerToDetokenizer]
    begun: list[Sequence]  # the sequences whose `Begin` is in the frame


class DetokenizerOutbox:
    """The outputs of one detokenizer, and the messages for it."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.up = True
        # Whether a send has failed that was not tried again since.
        self.blocked = False
        # The sequences that this detokenizer decodes, and how many it was ever given.
        self.held: dict[int, Sequence] = {}
        self.ever_given = 0
        # Unsent: attempts that ended, sequences to begin, and news of sequences that were begun.
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
        slots: the column `detokenizer` names the detokenizer that has begun the slot's sequence.
            That detokenizer is sent each new token.
    """

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._outboxes: dict[int, DetokenizerOutbox] = {}
        self._of: dict[int, DetokenizerOutbox] = {}  # by uid
        # Sequences that need a `Begin`, while there is no detokenizer.
        self._unassigned: dict[int, Sequence] = {}

    # Outputs ------------------------------------------------------------------------------------

    def sampled(
        self,
        sampled: Sampled,
        logprobs: list[RowLogprobs],
        sequence_of: Callable[[int], Sequence],
    ) -> None:
        """Passes on a step's tokens. `sequence_of` is called with the uids of sequences that need
        a `Begin`."""
        for index, outbox in self._outboxes.items():
            rows = (sampled.detokenizers == index).nonzero()[0]
            if len(rows):
                outbox.steps.append(_new_tokens(sampled, rows, logprobs))
        for uid in sampled.uids[sampled.detokenizers == NO_DETOKENIZER].tolist():
            self.begin(sequence_of(uid))

    def finish(self, ended: Ended) -> None:
        """Passes on the end of a sequence, whose tokens were all passed on before."""
        if ended.detokenizer == NO_DETOKENIZER:
            self.begin(ended.sequence)
        else:
            self._outboxes[ended.detokenizer].finished.append(ended.sequence)

    def begin(self, sequence: Sequence) -> None:
        """The sequence needs a `Begin`: no detokenizer knows its latest output, or its end."""
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
        """This attempt of the sequence has ended: its detokenizer forgets it."""
        uid = sequence.uid
        self._unassigned.pop(uid, None)
        outbox = self._of.pop(uid, None)
        if outbox is not None:
            del outbox.held[uid]
            outbox.pending_begins.pop(uid, None)
            outbox.ends[uid] = sequence.attempt

    def in_hand(self, peer: Peer) -> InHand:
        """The requests in hand of a detokenizer. A detokenizer may still work on any output that it
        was ever given, so a request is alone only if no other was given."""
        outbox = self._outboxes.get(peer.index)
        if outbox is None or outbox.peer != peer:
            return NOTHING_IN_HAND
        return InHand(list(outbox.held), alone=len(outbox.held) == outbox.ever_given == 1)

    # Detokenizers come and go -------------------------------------------------------------------

    def up(self, peer: Peer) -> None:
        """A connection to a detokenizer was made. The detokenizer has forgotten all outputs."""
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
        """The connection to a detokenizer is gone: others decode its outputs."""
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

    # Sending ----------------------------------------------------------------------

    def retry(self) -> None:
        """Time has passed: detokenizers that did not keep up are sent frames again."""
        for outbox in self._outboxes.values():
            outbox.blocked = False

    def frames(self) -> list[DetokenizerFrame]:
        """The next frame for each detokenizer that is not blocked. Call `delivered` or
        `undelivered` for each frame, before anything else."""
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
        """The frame could not be sent: after `retry` its news is sent merged, as `Begin`s."""
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
        submit, sampling = sequence.submit, sequence.submit.sampling
        return Begin(
            submit.uid,
            submit.attempt,
            output=self._slots.output(sequence),
            resumed=submit.resumed,
            text=TextOptions(
                sampling.stop,
                sampling.include_stop_str_in_output,
                sampling.skip_special_tokens,
                sampling.min_tokens,
                submit.answer_marks,
            ),
            prompt_tokens=sequence.prompt_tokens,
            cached_tokens=sequence.cached_tokens or 0,
            token_logprobs=list(sequence.logprobs),
            prompt_parts=list(sequence.prompt_parts),
            timings=sequence.timings,
        )


def _finished(sequence: Sequence) -> Finished:
    if sequence.finish is None:
        raise ValueError(f"request {sequence.uid} has not finished")
    return Finished(sequence.uid, sequence.attempt, *sequence.finish, sequence.timings)


def _new_tokens(sampled: Sampled, rows: Indices, logprobs: list[RowLogprobs]) -> NewTokens:
    """The message for these rows of `sampled`. `logprobs` belong to the whole result."""
    of_these = logprobs_of(sampled.result_rows[rows], logprobs) if logprobs else []
    return NewTokens(
        uids=pack_int64(sampled.uids[rows]),
        attempts=pack(sampled.attempts[rows]),
        offsets=pack(sampled.offsets[rows]),
        token_ids=pack(sampled.token_ids[rows]),
        logprob_rows=pack(i for i, _ in of_these),
        logprobs=[entry for _, entry in of_these],
    )
