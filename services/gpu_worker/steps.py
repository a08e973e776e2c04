"""A step on the device: from slots or columns to sampled tokens.

A step reads nothing back from the device, and no shape depends on a value there, so that a step can
be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.kernels.attention.interface import (
    AttentionBackend,
    AttentionMetadata,
    LayerCache,
)
from nanovllm.kernels.logits.processors import choose_mask
from nanovllm.kernels.sampling.reference import SamplingTensors
from nanovllm.kernels.slots.ops import DrawInputs, choose_slot_ops
from nanovllm.messages import NO_TOKEN_LEFT
from nanovllm.services.gpu_worker.logits import LogitsProcessors
from nanovllm.services.gpu_worker.model.registry import Model
from nanovllm.services.gpu_worker.sampling import logprobs, sample, sample_whole
from nanovllm.services.gpu_worker.slot_state import DeviceState, to_device
from nanovllm.services.gpu_worker.slots import Columns, Int32s, Layout, PromptSpan
from nanovllm.settings import Settings

PROMPT_ROWS = 256


class StepOutput(NamedTuple):
    """token_ids int64 [n] of n rows, the logits [n, shard] that the tokens were drawn from, and the
    rows' slots int64 [n]. Of a mixed step also `hidden` [tokens, hidden size], all of its tokens.
    """

    token_ids: Tensor
    logits: Tensor
    slots: Tensor
    hidden: Tensor | None = None


class Lengths(NamedTuple):
    """Query and context lengths of a step's rows, or upper bounds of them: int32 [rows], on the
    host."""

    query: Int32s
    context: Int32s


class Steps:
    """Runs the model over one rank's slots and cache."""

    def __init__(
        self,
        model: Model,
        backend: AttentionBackend,
        kv_cache: Sequence[LayerCache],
        state: DeviceState,
        settings: Settings,
        device: torch.device,
    ) -> None:
        self._model = model
        self._backend = backend
        self._kv_cache = kv_cache
        self._state = state
        self._block_size = settings.kvcache_block_size
        self._max_model_len = settings.max_model_len
        self._shard = model.head.ids
        self._device = device
        self._ops = choose_slot_ops(device)
        self._mask = choose_mask(device)
        self._row_numbers = torch.arange(
            settings.max_num_seqs + 1, dtype=torch.int32, device=device
        )
        self._none = torch.empty(0, dtype=torch.int64, device=device)

    def bounds(self, layout: Layout) -> Lengths:
        """Upper bounds for every step of this layout."""
        rows = layout.decodes + layout.chunks
        query = np.ones(rows, dtype=np.int32)
        query[layout.decodes :] = layout.tokens
        return Lengths(query, np.full(rows, self._max_model_len, dtype=np.int32))

    def decode(self, slots: Tensor, out: StepOutput) -> StepOutput:
        """All of the slots int64 [n] decode.

        Args:
            out: of n rows, where to write tokens and logits.
        """
        n = len(slots)
        inputs = self._ops.gather(self._state.held, slots, self._block_size)
        lengths = self.bounds(Layout(n, 0, 0, n))
        attention = AttentionMetadata(
            num_decodes=n,
            query_lens=lengths.query,
            context_lens=lengths.context,
            cu_seqlens_q=self._row_numbers[: n + 1],
            cache_seqlens=inputs.context_lens,
            block_tables=inputs.block_tables,
        )
        hidden = self._model.forward(
            inputs.token_ids,
            inputs.positions,
            inputs.kv_indices,
            self._backend.prepare(attention),
            self._kv_cache,
        )
        logits = self._model.logits(hidden, out.logits)
        token_ids = sample(
            logits, inputs.sampling, inputs.next_positions, self._shard, out.token_ids
        )
        return StepOutput(token_ids, logits, slots)

    def mixed(
        self, columns: Tensor, layout: Layout, lengths: Lengths, out: StepOutput | None = None
    ) -> StepOutput:
        """Some slots decode, and prefill chunks of others are computed. Either may be missing.

        Args:
            columns: int64, see `slots.Columns`.
            out: of layout.samples rows, where to write tokens and logits, if given.
        """
        held, decodes, block_size = self._state.held, layout.decodes, self._block_size
        c = Columns(*torch.split(columns, list(layout.lengths)))
        decode_slots = c.row_slots[:decodes]
        decode_contexts = held.num_tokens[decode_slots]
        positions = torch.cat((decode_contexts - 1, c.positions))
        token_slots = torch.cat((decode_slots, c.token_slots))
        blocks = held.block_tables[token_slots, positions // block_size].long()
        used_columns = -(-int(lengths.context.max()) // block_size)
        attention = AttentionMetadata(
            num_decodes=decodes,
            query_lens=lengths.query,
            context_lens=lengths.context,
            cu_seqlens_q=c.starts.int(),
            cache_seqlens=torch.cat((decode_contexts, c.contexts)).int(),
            block_tables=held.block_tables[:, :used_columns].index_select(0, c.row_slots),
        )
        hidden = self._model.forward(
            torch.cat((held.last_tokens[decode_slots], c.token_ids)),
            positions,
            blocks * block_size + positions % block_size,
            self._backend.prepare(attention),
            self._kv_cache,
        )
        if not layout.samples:
            return StepOutput(self._none, hidden[:0], self._none, hidden)
        tokens_out, logits_out = (None, None) if out is None else out[:2]
        logits = self._model.logits(hidden[c.sampling_tokens], logits_out)
        # A sequence's length is the index of the token that comes next.
        next_positions = held.num_tokens[c.sampling_slots]
        params = self._state.sampling(c.sampling_slots)
        token_ids = sample(logits, params, next_positions, self._shard, tokens_out)
        return StepOutput(token_ids, logits, c.sampling_slots, hidden)

    def prompt_logprobs(self, hidden: Tensor, span: PromptSpan) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the span's tokens, from `StepOutput.hidden`: ids and values as of
        `sampling.logprobs`, [t, count + 1]. The logits of PROMPT_ROWS tokens exist at a time."""
        token_ids = to_device(span.token_ids.astype(np.int64), self._device)
        hidden = hidden[span.row : span.row + len(token_ids)]
        ids = self._none.new_empty(len(token_ids), span.likeliest + 1)
        values = torch.empty_like(ids, dtype=torch.float32)
        for start in range(0, len(token_ids), PROMPT_ROWS):
            part = slice(start, start + PROMPT_ROWS)
            logits = self._model.logits(hidden[part])
            ids[part], values[part] = logprobs(logits, token_ids[part], span.likeliest, self._shard)
        return ids, values

    def draw_whole(self, output: StepOutput, drawn: Tensor) -> None:
        """Samples rows that need whole logits, if there is more than one rank.

        Args:
            output: of the step that these rows are in. Their tokens are overwritten.
            drawn: int64 [2, ranks * k], the rows' indices into `output`, and their slots. This rank
                draws k of them. A row may occur more than once.
        """
        inputs = self._ops.gather_draw(self._state.held, drawn, output.token_ids)
        token_ids = self._sample_whole(output.logits[drawn[0]], inputs)
        self._replace(output, drawn[0], inputs, token_ids)

    def draw_masked(self, output: StepOutput, drawn: Tensor, masks: Tensor) -> None:
        """Samples rows from masked logits. None needs whole logits.

        Args:
            output: of the step that these rows are in. Their tokens are overwritten, by
                NO_TOKEN_LEFT where a mask leaves a row none.
            drawn: int64 [2, n], the rows' indices into `output`, and their slots.
            masks: int32 [n, words], sets as `ProcessorState` has them.
        """
        inputs = self._ops.gather_draw(self._state.held, drawn, output.token_ids, masks)
        positions, params = inputs
        masked = self._mask(output.logits, drawn[0], masks, positions, self._shard.first)
        self._replace(output, drawn[0], inputs, sample(masked, params, positions, self._shard))

    def draw_processed(
        self, output: StepOutput, drawn: Tensor, processors: LogitsProcessors
    ) -> None:
        """Samples rows from logits that are processed.

        Args:
            output: of the step that these rows are in. Their tokens are overwritten, by
                NO_TOKEN_LEFT where the processors leave a row none.
            drawn: int64 [2, ranks * k], see `draw_whole`.
        """
        rows, slots = drawn
        inputs = self._ops.gather_draw(self._state.held, drawn, output.token_ids)
        processed = processors.process(output.logits, rows, slots, inputs.positions)
        if self._shard.tp.size == 1:
            token_ids = sample(processed, inputs.sampling, inputs.positions, self._shard)
        else:
            token_ids = self._sample_whole(processed, inputs)
        self._replace(output, rows, inputs, token_ids)
        processors.advance(slots, token_ids.clamp_min(0))

    def advance(self, output: StepOutput) -> Tensor:
        """Ends the step, once all of its rows are drawn: see `SlotOps.advance`."""
        return self._ops.advance(self._state.held, output.slots, output.token_ids)

    def _sample_whole(self, logits: Tensor, inputs: DrawInputs) -> Tensor:
        """The tokens of rows, int64 [ranks * k], of which this rank draws its k."""
        tp, rows = self._shard.tp, len(logits)
        own = slice(tp.rank * rows // tp.size, (tp.rank + 1) * rows // tp.size)
        params = SamplingTensors(*(values[own] for values in inputs.sampling))
        return sample_whole(logits, params, inputs.positions[own], self._shard)

    def _replace(
        self, output: StepOutput, rows: Tensor, inputs: DrawInputs, token_ids: Tensor
    ) -> None:
        self._ops.replace(rows, inputs.positions, token_ids, output.token_ids, NO_TOKEN_LEFT)
