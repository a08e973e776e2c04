"""The slots, column by column, so that what is done for all of them is a few array operations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nanovllm.protocol import FinishReason
from nanovllm.services.scheduler.sequences import NO_SLOT, Sequence

Ints = NDArray[np.int32]
Indices = NDArray[np.intp]

# A sequence with more stop tokens than this is looked at by itself.
STOP_COLUMNS = 8
NO_STOP = -1
NO_DETOKENIZER = -1


class Slots:
    """What a step must know of each slot. All arrays have one element (or row) a slot.

    Attributes:
        uid, attempt: of the sequence in it.
        epoch: how often the slot has become empty. A row of a plan belongs to the epoch in which
            it was planned.
        order: grows with each admission.
        prompt_tokens: of the sequence.
        known: tokens whose ids have arrived here, prompt included.
        context: tokens whose KV is written once all plans so far have run.
        limit: how many tokens the sequence may have, prompt included.
        decode_limit: the sequence decodes while `context` is below this: 0 until its prefill is
            planned, and then limit - 1, since the last token is sampled but never computed.
        last_plan: the latest plan with a row of it.
        registered: blocks that have their name.
        detokenizer: the index of the one that has begun the sequence, or NO_DETOKENIZER.
        stops: int32 [slots, STOP_COLUMNS], the tokens that end it, padded with NO_STOP.
        many_stops: whether there are more than fit into `stops`.
        tokens: int32 [slots, max_model_len], those known. Memory is touched only where used.
        sequences: who is in it.
        released: slots that became empty since the last plan.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        def column() -> Ints:
            return np.zeros(max_num_seqs, dtype=np.int32)

        self.uid = np.zeros(max_num_seqs, dtype=np.int64)
        self.attempt = column()
        self.epoch = column()
        self.order = np.zeros(max_num_seqs, dtype=np.int64)
        self.prompt_tokens = column()
        self.known = column()
        self.context = column()
        self.limit = column()
        self.decode_limit = column()
        self.last_plan = np.zeros(max_num_seqs, dtype=np.int64)
        self.registered = column()
        self.detokenizer = np.full(max_num_seqs, NO_DETOKENIZER, dtype=np.int32)
        self.stops = np.full((max_num_seqs, STOP_COLUMNS), NO_STOP, dtype=np.int32)
        self.many_stops = np.zeros(max_num_seqs, dtype=np.bool_)
        self.tokens = np.zeros((max_num_seqs, max_model_len), dtype=np.int32)
        self.sequences: list[Sequence | None] = [None] * max_num_seqs
        self.released: list[int] = []
        self._empty = list(range(max_num_seqs - 1, -1, -1))
        self._admissions = 0

    @property
    def any_empty(self) -> bool:
        return bool(self._empty)

    def occupy(self, sequence: Sequence, tokens: Ints, computed: int, limit: int) -> int:
        """Puts a sequence with these tokens, the KV of `computed` of which exists, into a slot.

        Returns the slot; raises IndexError if none is empty.
        """
        slot = self._empty.pop()
        self._admissions += 1
        self.uid[slot] = sequence.uid
        self.attempt[slot] = sequence.attempt
        self.order[slot] = self._admissions
        self.prompt_tokens[slot] = sequence.prompt_tokens
        self.known[slot] = len(tokens)
        self.context[slot] = computed
        self.limit[slot] = limit
        self.tokens[slot, : len(tokens)] = tokens
        stops = list(sequence.stop_ids)[:STOP_COLUMNS]
        self.stops[slot] = NO_STOP
        self.stops[slot, : len(stops)] = stops
        self.many_stops[slot] = len(sequence.stop_ids) > STOP_COLUMNS
        self.sequences[slot] = sequence
        sequence.slot = slot
        return slot

    def vacate(self, sequence: Sequence) -> None:
        """Takes the sequence out of its slot; it takes its output with it."""
        slot = sequence.slot
        sequence.output = self.output(sequence)
        sequence.slot = NO_SLOT
        self.sequences[slot] = None
        self.epoch[slot] += 1
        for column in (self.known, self.context, self.decode_limit, self.registered):
            column[slot] = 0
        self.detokenizer[slot] = NO_DETOKENIZER
        self.released.append(slot)
        self._empty.append(slot)

    def output(self, sequence: Sequence) -> bytes:
        """The output tokens (int32) of any sequence, in a slot or not."""
        slot = sequence.slot
        if slot == NO_SLOT:
            return sequence.output
        return self.tokens[slot, sequence.prompt_tokens : self.known[slot]].tobytes()

    def detokenizer_of(self, sequence: Sequence) -> int:
        """The index of the detokenizer that has begun the sequence, or NO_DETOKENIZER."""
        return NO_DETOKENIZER if sequence.slot == NO_SLOT else int(self.detokenizer[sequence.slot])

    def occupant(self, slot: int) -> Sequence:
        """The sequence in a slot; raises LookupError if it is empty."""
        sequence = self.sequences[slot]
        if sequence is None:
            raise LookupError(f"slot {slot} is empty")
        return sequence

    def decoding(self) -> Indices:
        """The slots whose next token can be planned now, without knowing the one before it."""
        return (self.context < self.decode_limit).nonzero()[0]

    def ended(self, rows: Indices, token_ids: Ints) -> dict[int, FinishReason]:
        """Of slots to which these tokens just came: the places in `rows` of those that ended."""
        ended: dict[int, FinishReason] = {}
        for i in (self.known[rows] == self.limit[rows]).nonzero()[0].tolist():
            ended[i] = "length"
        for i in (self.stops[rows] == token_ids[:, None]).nonzero()[0].tolist():
            ended[i] = "stop"
        for i in self.many_stops[rows].nonzero()[0].tolist():
            if int(token_ids[i]) in self.occupant(int(rows[i])).stop_ids:
                ended[i] = "stop"
        return ended

    def take_released(self) -> list[int]:
        """The slots to be named in the next plan as released."""
        released, self.released = self.released, []
        return released
