"""Runs step plans on the model: slot state in, sampled tokens out.

Nothing here waits for the device: a step is enqueued, and its tokens are on their way to the host
when `step` returns. They are also where the next step needs them, on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.attention.interface import (
    AttentionBackend,
    AttentionMetadata,
    LayerCache,
)
from nanovllm.kernels.slots.ops import choose_slot_ops
from nanovllm.messages import RowLogprobs, StepPlan, StepResult, TokenLogprobs, pack
from nanovllm.services.gpu_worker.device_state import DeviceState, columns_to_device, to_device
from nanovllm.services.gpu_worker.graphs import Decoded, DecodeGraphs
from nanovllm.services.gpu_worker.memory import blocks_per_sequence
from nanovllm.services.gpu_worker.model.qwen3 import Qwen3ForCausalLM
from nanovllm.services.gpu_worker.sampling import logprobs, sample
from nanovllm.services.gpu_worker.slots import Batch, SlotTable
from nanovllm.settings import Settings


class SampledLogprobs(NamedTuple):
    """int32 and float32 [r, most asked for + 1] of the r rows that asked; `rows` has each one's
    index among those that sampled, and how many it asked for."""

    rows: list[tuple[int, int]]
    token_ids: Tensor
    values: Tensor


class Sampled(NamedTuple):
    """What a step sampled; on the host once `wait` returns.

    Attributes:
        number: the plan's.
        token_ids: int32 [s].
        logprobs: None if no row asked.
        started, on_host: when the device began the step, and when all of this was on the host;
            None if the device is the host.
    """

    number: int
    token_ids: Tensor
    logprobs: SampledLogprobs | None
    started: torch.cuda.Event | None
    on_host: torch.cuda.Event | None

    def wait(self) -> None:
        if self.on_host is not None:
            self.on_host.synchronize()

    def device_seconds(self) -> float | None:
        """How long the step took on the device, by its own clock; None if that is the host.
        Call `wait` first."""
        if self.started is None or self.on_host is None:
            return None
        return float(self.started.elapsed_time(self.on_host)) / 1000

    def result(self, busy_us: int, at_us: int) -> StepResult:
        """As a message; call `wait` first."""
        return StepResult(
            number=self.number,
            token_ids=pack(self.token_ids.numpy()),
            logprobs=[] if self.logprobs is None else _rows(self.logprobs),
            busy_us=busy_us,
            at_us=at_us,
        )


class Executor:
    """One rank's model, cache and slots.

    Args:
        device: where model and cache are.
        kv_cache: one for each layer; its last block is not the scheduler's.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Qwen3ForCausalLM,
        backend: AttentionBackend,
        kv_cache: Sequence[LayerCache],
        settings: Settings,
        device: torch.device,
    ) -> None:
        self._model = model
        self._ids = model.head.ids
        self._backend = backend
        self._kv_cache = kv_cache
        self._device = device
        self._settings = settings
        self._block_size = settings.kvcache_block_size
        self.slots = SlotTable(settings.max_num_seqs)
        # The last block belongs to no sequence.
        spare_block = len(kv_cache[0].k) - 1
        self._state = DeviceState(
            settings.max_num_seqs, blocks_per_sequence(settings), spare_block, device
        )
        self._ops = choose_slot_ops(device)
        self._row_numbers = torch.arange(
            settings.max_num_seqs + 1, dtype=torch.int32, device=device
        )
        self._no_tokens = torch.empty(0, dtype=torch.int32, device=device)
        self._graphs: DecodeGraphs | None = None

    @torch.inference_mode()
    def capture_graphs(self, sizes: Sequence[int], progress: Callable[[int, int], None]) -> None:
        """From here on, steps of decodes alone are replayed. CUDA only.

        Args:
            sizes: see `DecodeGraphs`; the last one is `max_num_seqs`.
            progress: told how many graphs are captured, of how many.
        """
        self._graphs = DecodeGraphs(
            self._decode, sizes, self._state.padding_slot, self._device, progress
        )

    def reset(self) -> None:
        """Empties all slots."""
        self.slots.reset()

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> Sampled:
        """Enqueues a step. All ranks must call it with the same plans."""
        batch = self.slots.apply(plan)
        started = _event(self._device)
        self._state.update(batch)
        if not len(batch.query_lens):
            return self._sampled(plan.number, self._no_tokens, None, started)
        if self._graphs is not None and not len(batch.chunk_slots):
            token_ids, logits = self._graphs.replay(batch.decode_slots)
            found = self._logprobs(batch, logits, token_ids)
            return self._sampled(plan.number, token_ids, found, started)
        inputs = self._inputs(batch)
        hidden = self._model.forward(
            inputs.token_ids,
            inputs.positions,
            inputs.slot_mapping,
            self._backend.prepare(inputs.attention),
            self._kv_cache,
        )
        slots = inputs.sampling_slots
        if not len(slots):
            return self._sampled(plan.number, self._no_tokens, None, started)
        logits = self._model.logits(hidden[inputs.sampling_tokens])
        # A sequence's length is the index of the token that comes next.
        positions = self._state.held.num_tokens[slots]
        drawn = sample(logits, self._state.sampling(slots), positions, self._ids)
        token_ids = self._ops.advance(self._state.held, slots, drawn)
        found = self._logprobs(batch, logits, token_ids)
        return self._sampled(plan.number, token_ids, found, started)

    def _decode(self, slots: Tensor) -> Decoded:
        """A decode step that knows nothing from the host: see `graphs.Decode`."""
        inputs = self._ops.gather(self._state.held, slots, self._block_size)
        n = len(slots)
        attention = AttentionMetadata(
            num_decodes=n,
            query_lens=np.ones(n, dtype=np.int32),
            context_lens=np.full(n, self._settings.max_model_len, dtype=np.int32),
            cu_seqlens_q=self._row_numbers[: n + 1],
            cache_seqlens=inputs.context_lens,
            block_tables=inputs.block_tables,
        )
        hidden = self._model.forward(
            inputs.token_ids,
            inputs.positions,
            inputs.slot_mapping,
            self._backend.prepare(attention),
            self._kv_cache,
        )
        logits = self._model.logits(hidden)
        token_ids = sample(logits, inputs.sampling, inputs.next_positions, self._ids)
        return Decoded(self._ops.advance(self._state.held, slots, token_ids), logits)

    def _inputs(self, batch: Batch) -> _Inputs:
        decodes, state = len(batch.decode_slots), self._state.held
        (
            row_slots,
            chunk_token_slots,
            chunk_tokens,
            chunk_positions,
            chunk_contexts,
            query_lens,
            sampling_rows,
        ) = columns_to_device(
            (
                np.concatenate((batch.decode_slots, batch.chunk_slots)),
                np.repeat(batch.chunk_slots, batch.query_lens[decodes:]),
                batch.chunk_tokens,
                batch.chunk_positions,
                batch.context_lens[decodes:],
                batch.query_lens,
                batch.sampling_rows,
            ),
            self._device,
        )
        decode_slots = row_slots[:decodes]
        decode_contexts = state.num_tokens[decode_slots]
        positions = torch.cat((decode_contexts - 1, chunk_positions))
        token_slots = torch.cat((decode_slots, chunk_token_slots))
        blocks = state.block_tables[token_slots, positions // self._block_size].long()
        ends = query_lens.cumsum(0)
        columns = -(-int(batch.context_lens.max()) // self._block_size)
        return _Inputs(
            token_ids=torch.cat((state.last_tokens[decode_slots], chunk_tokens)),
            positions=positions,
            slot_mapping=blocks * self._block_size + positions % self._block_size,
            sampling_tokens=ends[sampling_rows] - 1,
            sampling_slots=row_slots[sampling_rows],
            attention=AttentionMetadata(
                num_decodes=decodes,
                query_lens=batch.query_lens,
                context_lens=batch.context_lens,
                cu_seqlens_q=F.pad(ends, (1, 0)).int(),
                cache_seqlens=torch.cat((decode_contexts, chunk_contexts)).int(),
                block_tables=state.block_tables[:, :columns].index_select(0, row_slots),
            ),
        )

    def _sampled(
        self,
        number: int,
        token_ids: Tensor,
        logprobs: SampledLogprobs | None,
        started: torch.cuda.Event | None,
    ) -> Sampled:
        """Sends what was sampled, int32 [s], on its way to the host."""
        if logprobs is not None:
            logprobs = SampledLogprobs(
                logprobs.rows, _to_host(logprobs.token_ids), _to_host(logprobs.values)
            )
        return Sampled(number, _to_host(token_ids), logprobs, started, _event(self._device))

    def _logprobs(self, batch: Batch, logits: Tensor, token_ids: Tensor) -> SampledLogprobs | None:
        rows = batch.wants_logprobs
        if not rows:
            return None
        chosen = to_device(np.array([row for row, _ in rows]), logits.device)
        most = min(max(count for _, count in rows), self._model.config.vocab_size)
        ids, values = logprobs(logits[chosen], token_ids[chosen].long(), most, self._ids)
        return SampledLogprobs(rows, ids.int(), values)


class _Inputs(NamedTuple):
    """Of a step with T query tokens, s rows of which sample.

    Attributes:
        token_ids, positions: int64 [T].
        slot_mapping: int64 [T], where each token's key and value go: block * block_size + offset.
        sampling_tokens, sampling_slots: int64 [s]; the rows' last query tokens, and their slots.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    sampling_tokens: Tensor
    sampling_slots: Tensor
    attention: AttentionMetadata


def _event(device: torch.device) -> torch.cuda.Event | None:
    """The moment at which the device comes to this point of its queue."""
    if device.type != "cuda":
        return None
    # Blocking: who waits for it sleeps.
    event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _to_host(x: Tensor) -> Tensor:
    # From CUDA this lands in pinned memory, else it could not go on by itself.
    return x.to("cpu", non_blocking=True)


def _rows(found: SampledLogprobs) -> list[RowLogprobs]:
    ids, values = found.token_ids.numpy(), found.values.numpy()
    return [
        RowLogprobs(
            row=row,
            logprobs=TokenLogprobs(
                token_ids=pack(ids[i, : count + 1]),
                values=values[i, : count + 1].astype("<f4", copy=False).tobytes(),
            ),
        )
        for i, (row, count) in enumerate(found.rows)
    ]
