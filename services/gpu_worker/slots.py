"""The host's mirror of the slots: turns a step plan into a ragged batch, and into the columns that
the device is sent. No torch.

When the host launches a step, it does not know the tokens of the steps before, but it knows how
many they are: each row that samples adds one. So the host has lengths, positions and block tables
ahead of the device, and only the tokens stay on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from nanovllm.kernels.sampling import SHORTLIST_SIZE
from nanovllm.messages import Admission, StepPlan, unpack
from nanovllm.protocol import Sampling

Int32s = NDArray[np.int32]

NO_LOGPROBS = -1


class PromptSpan(NamedTuple):
    """The tokens of a prefill chunk whose log-probabilities are asked for.

    Attributes:
        first: the first one's index in its prompt.
        row: the batch's token before the first one; one token a row from there on.
        likeliest: how many likeliest tokens to report beside each.
        token_ids: int32 [t], the tokens.
    """

    first: int
    row: int
    likeliest: int
    token_ids: Int32s


class Batch(NamedTuple):
    """What one plan changes and runs. The n rows are d decodes, then p prefill chunks of t tokens
    together; s of the rows sample."""

    admitted: Sequence[Admission]  # sequences that take a slot
    admitted_processed: Sequence[Admission]  # of these, the ones that ask for a logits processor
    block_updates: Int32s  # [u, 3], (slot, column, block): entries of the block tables to write
    decode_slots: Int32s  # [d]; the tokens and positions of decodes are on the device
    chunk_slots: Int32s  # [p]
    chunk_tokens: Int32s  # [t], token ids
    chunk_positions: Int32s  # [t], each token's index in its sequence
    query_lens: Int32s  # [n], 1 for each decode
    context_lens: Int32s  # [n], query tokens included
    sampling_rows: Int32s  # [s], all decodes, then the chunks that reach their last token
    sampling_slots: Int32s  # [s], the slots of `sampling_rows`, each at most once
    sampled_positions: Int32s  # [s], each sampled token's index in its sequence
    # [w], which of the s rows need whole logits: they draw from more than SHORTLIST_SIZE tokens.
    # Rows whose logits are processed are not among them.
    whole_rows: Int32s
    processed_rows: Int32s  # which of the s rows have their logits processed
    constrained_rows: Int32s  # which of the s rows have a grammar: the next two together
    masked_rows: Int32s  # which of the s rows have a grammar, and are not processed otherwise
    restricted_rows: Int32s  # which of the processed rows have a grammar
    logprobs: Int32s  # [s], how many likeliest tokens to report, or NO_LOGPROBS
    prompt_spans: Sequence[PromptSpan] = ()

    @property
    def wants_logprobs(self) -> list[tuple[int, int]]:
        """(index among the s rows, how many likeliest tokens) of each row that asked."""
        rows = (self.logprobs != NO_LOGPROBS).nonzero()[0]
        return list(zip(rows.tolist(), self.logprobs[rows].tolist(), strict=True))


class SlotTable:
    """What the host knows of every slot after the last plan applied.

    Plans are trusted: the scheduler has checked them. A slot that does not exist raises IndexError.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._num_tokens: Int32s = np.zeros(max_num_seqs, dtype=np.int32)
        self._num_blocks = [0] * max_num_seqs
        self._logprobs = np.full(max_num_seqs, NO_LOGPROBS, dtype=np.int32)
        self._needs_whole_logits = np.zeros(max_num_seqs, dtype=np.bool_)
        self._processes_logits = np.zeros(max_num_seqs, dtype=np.bool_)
        self._constrained = np.zeros(max_num_seqs, dtype=np.bool_)
        # Of the sequences that ask for log-probabilities of their prompts: how many likeliest
        # tokens, and the prompt's length.
        self._prompt_logprobs: dict[int, tuple[int, int]] = {}
        self._indices = np.arange(max_num_seqs, dtype=np.int32)
        self._ones = np.ones(max_num_seqs, dtype=np.int32)
        # Tokens of sequences whose prefill is not complete.
        self._to_prefill: dict[int, Int32s] = {}
        self._used: set[int] = set()

    @property
    def used(self) -> int:
        """How many slots hold a sequence."""
        return len(self._used)

    def reset(self) -> None:
        """Empties all slots."""
        self._to_prefill.clear()
        self._prompt_logprobs.clear()
        self._used.clear()

    def apply(self, plan: StepPlan) -> Batch:
        """Applies a plan's changes, and describes its batch."""
        for slot in unpack(plan.release).tolist():
            self._used.remove(slot)
            self._to_prefill.pop(slot, None)
            self._prompt_logprobs.pop(slot, None)
        updates: list[tuple[int, int, int]] = []
        for admission in plan.admit:
            self._admit(admission)
            self._append(admission.slot, unpack(admission.blocks).tolist(), updates)
        for slot, block in unpack(plan.append).reshape(-1, 2).tolist():
            self._append(slot, [block], updates)

        decode_slots = sampling_slots = unpack(plan.decode)
        query_lens = self._ones[: len(decode_slots)]
        context_lens = self._num_tokens[decode_slots]
        sampling_rows = self._indices[: len(decode_slots)]
        chunks = _NO_CHUNKS
        prompt_spans: list[PromptSpan] = []
        if plan.prefill:
            if self._prompt_logprobs:
                prompt_spans = self._spans(plan.prefill, len(decode_slots))
            chunks = self._chunks(unpack(plan.prefill).reshape(-1, 3))
            query_lens = np.concatenate((query_lens, chunks.lengths))
            context_lens = np.concatenate((context_lens, chunks.ends))
            complete = chunks.complete + np.int32(len(decode_slots))
            sampling_rows = np.concatenate((sampling_rows, complete))
            sampling_slots = np.concatenate((decode_slots, chunks.slots[chunks.complete]))
        sampled_positions = self._num_tokens[sampling_slots]
        self._num_tokens[sampling_slots] = sampled_positions + 1
        samples = self._indices[: len(sampling_slots)]
        processed = self._processes_logits[sampling_slots]
        constrained = self._constrained[sampling_slots]
        return Batch(
            admitted=plan.admit,
            admitted_processed=[one for one in plan.admit if self._processes_logits[one.slot]],
            block_updates=np.array(updates, dtype=np.int32).reshape(-1, 3),
            decode_slots=decode_slots,
            chunk_slots=chunks.slots,
            chunk_tokens=chunks.tokens,
            chunk_positions=chunks.positions,
            query_lens=query_lens,
            context_lens=context_lens,
            sampling_rows=sampling_rows,
            sampling_slots=sampling_slots,
            sampled_positions=sampled_positions,
            whole_rows=samples[self._needs_whole_logits[sampling_slots]],
            processed_rows=samples[processed],
            constrained_rows=samples[constrained],
            masked_rows=samples[constrained & ~processed],
            restricted_rows=samples[constrained & processed],
            logprobs=self._logprobs[sampling_slots],
            prompt_spans=prompt_spans,
        )

    def _admit(self, admission: Admission) -> None:
        slot, sampling = admission.slot, admission.sampling
        tokens = unpack(admission.tokens)
        self._used.add(slot)
        self._to_prefill[slot] = tokens
        self._num_tokens[slot] = len(tokens)
        self._num_blocks[slot] = 0
        self._logprobs[slot] = NO_LOGPROBS if sampling.logprobs is None else sampling.logprobs
        if sampling.prompt_logprobs is not None:
            self._prompt_logprobs[slot] = sampling.prompt_logprobs, admission.prompt_tokens
        constrained, whole = admission.matcher is not None, _needs_whole_logits(sampling)
        processes = _processes_logits(sampling) or (constrained and whole)
        self._processes_logits[slot] = processes
        self._constrained[slot] = constrained
        self._needs_whole_logits[slot] = whole and not processes

    def _append(self, slot: int, blocks: list[int], updates: list[tuple[int, int, int]]) -> None:
        first = self._num_blocks[slot]
        updates.extend((slot, column, block) for column, block in enumerate(blocks, first))
        self._num_blocks[slot] = first + len(blocks)

    def _spans(self, prefill: bytes, decodes: int) -> list[PromptSpan]:
        """One for each chunk of a sequence that asks, perhaps of no token."""
        spans: list[PromptSpan] = []
        row = decodes
        for slot, start, length in unpack(prefill).reshape(-1, 3).tolist():
            if slot in self._prompt_logprobs:
                count, prompt_tokens = self._prompt_logprobs[slot]
                end = min(start + length + 1, prompt_tokens)
                token_ids = self._to_prefill[slot][start + 1 : end]
                spans.append(PromptSpan(start + 1, row, count, token_ids))
            row += length
        return spans

    def _chunks(self, chunks: Int32s) -> _Chunks:
        """The prefill chunks int32 [p, 3] of a plan, with their tokens."""
        slots, starts, lengths = chunks.T
        ends = starts + lengths
        spans = list(zip(slots.tolist(), starts.tolist(), ends.tolist(), strict=True))
        tokens = [self._to_prefill[slot][start:end] for slot, start, end in spans]
        positions = [np.arange(start, end, dtype=np.int32) for _, start, end in spans]
        complete = np.flatnonzero(ends == self._num_tokens[slots]).astype(np.int32)
        for slot in slots[complete].tolist():
            del self._to_prefill[slot]
        return _Chunks(
            slots, lengths, ends, np.concatenate(tokens), np.concatenate(positions), complete
        )


def _processes_logits(sampling: Sampling) -> bool:
    """Whether the request asks for a logits processor, beside a grammar."""
    return bool(
        sampling.repetition_penalty != 1
        or sampling.frequency_penalty
        or sampling.presence_penalty
        or sampling.logit_bias
        or sampling.min_tokens
        or sampling.bad_words
        or sampling.allowed_token_ids is not None
    )


def _needs_whole_logits(sampling: Sampling) -> bool:
    """Whether the filters may keep more than SHORTLIST_SIZE tokens of a shard."""
    if sampling.temperature == 0:
        return False
    if sampling.top_k == 0:
        return sampling.top_p < 1 or sampling.min_p > 0
    return sampling.top_k > SHORTLIST_SIZE


class _Chunks(NamedTuple):
    """p prefill chunks of t tokens together."""

    slots: Int32s  # [p]
    lengths: Int32s  # [p]
    ends: Int32s  # [p], each chunk's last position plus 1
    tokens: Int32s  # [t]
    positions: Int32s  # [t]
    complete: Int32s  # indices of the chunks that reach their sequence's last token


# Most steps have no chunks.
_NO_CHUNKS = _Chunks(*[np.empty(0, dtype=np.int32)] * 6)


class Layout(NamedTuple):
    """Room for so many decodes, prefill chunks, tokens of all chunks, and rows that sample.

    A step that is launched has a layout of exactly its size. A step that is replayed has the
    graph's layout, which may have room left: rows of the padding slot, chunks without tokens, and
    tokens of no chunk.
    """

    decodes: int
    chunks: int
    tokens: int
    samples: int

    @classmethod
    def of(cls, batch: Batch) -> Layout:
        """The layout of exactly the batch's size."""
        return cls(
            len(batch.decode_slots),
            len(batch.chunk_slots),
            len(batch.chunk_tokens),
            len(batch.sampling_rows),
        )

    @property
    def lengths(self) -> Columns[int]:
        """How long each column is."""
        rows = self.decodes + self.chunks
        return Columns(
            row_slots=rows,
            token_slots=self.tokens,
            token_ids=self.tokens,
            positions=self.tokens,
            contexts=self.chunks,
            starts=rows + 1,
            sampling_tokens=self.samples,
            sampling_slots=self.samples,
        )


C = TypeVar("C")


class Columns(NamedTuple, Generic[C]):
    """What the device is sent of a batch. Rows and tokens of decodes come before those of chunks.

    The columns travel one after the other, in one int64 array.
    """

    row_slots: C  # [decodes + chunks]
    token_slots: C  # [tokens], of the chunks' tokens, as the next two columns
    token_ids: C  # [tokens]
    positions: C  # [tokens], each token's index in its sequence
    contexts: C  # [chunks], context lengths, query tokens included
    starts: C  # [decodes + chunks + 1], each row's first token, then the number of tokens
    sampling_tokens: C  # [samples], the last token of each row that samples
    sampling_slots: C  # [samples], the slot of each row that samples


def columns(batch: Batch, layout: Layout, padding_slot: int) -> NDArray[np.int64]:
    """The columns of `batch`, one after the other.

    Args:
        padding_slot: the slot of rows and tokens that the layout has too many.
    """
    decodes, chunks, tokens, samples = Layout.of(batch)
    flat = np.zeros(sum(layout.lengths), dtype=np.int64)
    c = Columns(*np.split(flat, np.cumsum(layout.lengths)[:-1]))
    lengths = batch.query_lens[decodes:]
    c.row_slots[:] = padding_slot
    c.row_slots[:decodes] = batch.decode_slots
    c.row_slots[layout.decodes : layout.decodes + chunks] = batch.chunk_slots
    c.token_slots[tokens:] = padding_slot
    c.token_slots[:tokens] = np.repeat(batch.chunk_slots, lengths)
    c.token_ids[:tokens] = batch.chunk_tokens
    c.positions[:tokens] = batch.chunk_positions
    c.contexts[:chunks] = batch.context_lens[decodes:]
    ends = layout.decodes + np.cumsum(lengths)
    c.starts[: layout.decodes] = np.arange(layout.decodes)
    c.starts[layout.decodes] = layout.decodes
    c.starts[layout.decodes + 1 :] = layout.decodes + tokens
    c.starts[layout.decodes + 1 : layout.decodes + 1 + chunks] = ends
    c.sampling_tokens[:decodes] = np.arange(decodes)
    complete = batch.sampling_rows[decodes:] - decodes
    c.sampling_tokens[decodes:samples] = ends[complete] - 1
    c.sampling_slots[:] = padding_slot
    c.sampling_slots[:samples] = batch.sampling_slots
    return flat
