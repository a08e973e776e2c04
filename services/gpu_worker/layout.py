"""What the device is told of a step with prefill chunks: one array, cut into columns. No torch.

A step that is launched has a layout of its own size. One that is replayed has its graph's, which
may have room for more: what is too many is rows of a slot that is nobody's, chunks without tokens,
and tokens of no chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanovllm.services.gpu_worker.slots import Batch


class Layout(NamedTuple):
    """Room for so many decodes, prefill chunks, tokens of them all, and rows that sample."""

    decodes: int
    chunks: int
    tokens: int
    samples: int

    @classmethod
    def of(cls, batch: Batch) -> Layout:
        """No larger than the batch is."""
        return cls(
            len(batch.decode_slots),
            len(batch.chunk_slots),
            len(batch.chunk_tokens),
            len(batch.sampling_rows),
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the columns, in the order of `columns`."""
        rows = self.decodes + self.chunks
        return (
            rows,
            self.tokens,
            self.tokens,
            self.tokens,
            self.chunks,
            rows + 1,
            self.samples,
            self.samples,
        )


def columns(batch: Batch, layout: Layout, nobodys: int) -> NDArray[np.int64]:
    """The columns of `batch`, one after the other.

    Args:
        nobodys: the slot of what is too many.

    They are, with the decodes' rows and tokens before those of the chunks:

        row_slots        [decodes + chunks]
        token_slots      [tokens], of the chunks' tokens, as the next two
        token_ids        [tokens]
        positions        [tokens], each token's index in its sequence
        contexts         [chunks], their query tokens included
        starts           [decodes + chunks + 1], each row's first token, and how many there are
        sampling_tokens  [samples], the last tokens of the rows that sample
        sampling_slots   [samples], their slots
    """
    decodes, chunks, tokens, samples = Layout.of(batch)
    flat = np.zeros(sum(layout.lengths), dtype=np.int64)
    ends = np.cumsum(layout.lengths)[:-1]
    (
        row_slots,
        token_slots,
        token_ids,
        positions,
        contexts,
        starts,
        sampling_tokens,
        sampling_slots,
    ) = np.split(flat, ends)
    lengths = batch.query_lens[decodes:]
    row_slots[:] = nobodys
    row_slots[:decodes] = batch.decode_slots
    row_slots[layout.decodes : layout.decodes + chunks] = batch.chunk_slots
    token_slots[tokens:] = nobodys
    token_slots[:tokens] = np.repeat(batch.chunk_slots, lengths)
    token_ids[:tokens] = batch.chunk_tokens
    positions[:tokens] = batch.chunk_positions
    contexts[:chunks] = batch.context_lens[decodes:]
    starts[: layout.decodes] = np.arange(layout.decodes)
    starts[layout.decodes] = layout.decodes
    starts[layout.decodes + 1 :] = layout.decodes + tokens
    starts[layout.decodes + 1 : layout.decodes + 1 + chunks] = layout.decodes + np.cumsum(lengths)
    sampling_tokens[:decodes] = np.arange(decodes)
    chunk_rows = batch.sampling_rows[decodes:] - decodes
    sampling_tokens[decodes:samples] = starts[layout.decodes + 1 + chunk_rows] - 1
    sampling_slots[:] = nobodys
    sampling_slots[:samples] = batch.sampling_slots
    return flat
