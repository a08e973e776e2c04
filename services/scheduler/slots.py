"""The slots, column by column: what a step does for all slots is a few array operations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nanovllm.protocol import FinishReason
from nanovllm.services.scheduler.sequences import NO_SLOT, Sequence

Ints = NDArray[np.int32]
Indices = NDArray[np.intp]

# So many stop tokens of a slot are compared at once. A sequence with more is looked at by itself.
STOP_COLUMNS = 8
NO_STOP = -1
NO_DETOKENIZER = -1


class Slots:
    """What a step must know of each slot. Every array has one element, or one row, a slot."""

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        def column() -> Ints:
            return np.zeros(max_num_seqs, dtype=np.int32)

        self.sequences: list[Sequence | None] = [None] * max_num_seqs
        # Of the sequence in the slot.
        self.uid = np.zeros(max_num_seqs, dtype=np.int64)
        self.attempt = column()
        self.prompt_tokens = column()
        # How often the slot has become empty. A row of a plan belongs to the epoch of its planning.
        self.epoch = column()
        # A number that grows with each admission.
        self.order = np.zeros(max_num_seqs, dtype=np.int64)
        # The number of tokens, prompt included: tokens that are known here; tokens whose keys and
        # values are written once all plans so far have run; tokens that the sequence may have.
        self.known = column()
        self.context = column()
        self.limit = column()
        # The sequence decodes while `context` is below this: 0 until its prefill is planned, and
        # then limit - 1, since the last token is sampled but never computed.
        self.decode_limit = column()
        # The latest plan that has a row of the slot.
        self.last_plan = np.zeros(max_num_seqs, dtype=np.int64)
        # How many blocks have a name.
        self.registered = column()
        self.wants_prompt_logprobs = np.zeros(max_num_seqs, dtype=np.bool_)
        # The index of the detokenizer that has begun the sequence, or NO_DETOKENIZER.
        self.detokenizer = np.full(max_num_seqs, NO_DETOKENIZER, dtype=np.int32)
        # Stop tokens, padded with NO_STOP, and whether the sequence has more of them.
        self.stops = np.full((max_num_seqs, STOP_COLUMNS), NO_STOP, dtype=np.int32)
        self.many_stops = np.zeros(max_num_seqs, dtype=np.bool_)
        # The known tokens. The system gives memory only to the pages that are written.
        self.tokens = np.zeros((max_num_seqs, max_model_len), dtype=np.int32)
        # Slots that became empty since the last plan.
        self.released: list[int] = []
        self._empty = list(range(max_num_seqs - 1, -1, -1))
        self._admissions = 0

    @property
    def any_empty(self) -> bool:
        return bool(self._empty)

    def occupy(self, sequence: Sequence, tokens: Ints, computed: int, limit: int) -> int:
        """Puts a sequence into an empty slot, and returns the slot.

        Args:
            tokens: prompt and output, int32.
            computed: of how many tokens the keys and values exist.
            limit: how many tokens the sequence may have.

        Raises IndexError if no slot is empty.
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
        """Takes the sequence out of its slot. The sequence keeps its output."""
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
        """The output tokens (int32) of a sequence, in a slot or not."""
        slot = sequence.slot
        if slot == NO_SLOT:
            return sequence.output
        return self.tokens[slot, sequence.prompt_tokens : self.known[slot]].tobytes()

    def detokenizer_of(self, sequence: Sequence) -> int:
        """The index of the detokenizer that has begun the sequence, or NO_DETOKENIZER."""
        return NO_DETOKENIZER if sequence.slot == NO_SLOT else int(self.detokenizer[sequence.slot])

    def occupant(self, slot: int) -> Sequence:
        """The sequence in a slot. Raises LookupError if the slot is empty."""
        sequence = self.sequences[slot]
        if sequence is None:
            raise LookupError(f"slot {slot} is empty")
        return sequence

    def decoding(self) -> Indices:
        """The slots whose next token can be planned now, without knowing the one before it."""
        return (self.context < self.decode_limit).nonzero()[0]

    def ended(self, rows: Indices, token_ids: Ints) -> dict[int, FinishReason]:
        """Which sequences end with their newest tokens: index in `rows` to reason.

        Args:
            rows: slots, whose newest tokens are `token_ids`, int32 [rows].
        """
        ended: dict[int, FinishReason] = {}
        for i in (self.known[rows] == self.limit[rows]).nonzero()[0].tolist():
            ended[i] = "length"
        stops = self.stops.take(rows, axis=0) == token_ids[:, None]
        for i in np.flatnonzero(stops).tolist():
            ended[i // STOP_COLUMNS] = "stop"
        for i in self.many_stops[rows].nonzero()[0].tolist():
            if int(token_ids[i]) in self.occupant(int(rows[i])).stop_ids:
                ended[i] = "stop"
        return ended

    def take_released(self) -> list[int]:
        """The slots that the next plan releases."""
        released, self.released = self.released, []
        return released
