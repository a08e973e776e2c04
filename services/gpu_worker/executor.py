"""Runs step plans on one rank's model, cache and slots.

Nothing here waits for the device. When `step` returns, the step is enqueued, and so is the copy of
its tokens to the host. The next step finds the tokens on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nanovllm.grammars import Matcher
from nanovllm.kernels.attention.interface import AttentionBackend, LayerCache
from nanovllm.messages import StepPlan
from nanovllm.services.gpu_worker.graphs import (
    MASKED_SIZES,
    PROCESSED_SHARES,
    WHOLE_SHARES,
    Capture,
    DrawGraph,
    Sizes,
    StepGraphs,
    capture_draws,
    first_rows,
    pinned,
)
from nanovllm.services.gpu_worker.logits import LogitsProcessors
from nanovllm.services.gpu_worker.masks import MaskBuffers
from nanovllm.services.gpu_worker.matchers import SlotMatchers
from nanovllm.services.gpu_worker.memory import blocks_per_sequence
from nanovllm.services.gpu_worker.model.registry import Model
from nanovllm.services.gpu_worker.results import (
    NO_ROWS,
    PendingResult,
    PromptLogprobs,
    SampledLogprobs,
    to_host,
)
from nanovllm.services.gpu_worker.sampling import logprobs
from nanovllm.services.gpu_worker.slot_state import DeviceState, to_device
from nanovllm.services.gpu_worker.slots import Batch, Int32s, Layout, SlotTable, columns
from nanovllm.services.gpu_worker.steps import Lengths, StepOutput, Steps
from nanovllm.settings import Settings
from nanovllm.token_sets import num_words

NO_TOKENS = torch.empty(0, dtype=torch.int32)
NO_MATCHERS: Mapping[int, Matcher] = {}


class Executor:
    """See the module.

    Args:
        kv_cache: one for each layer. The last block is a spare one, which no sequence gets.
        device: where model and cache are.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Model,
        backend: AttentionBackend,
        kv_cache: Sequence[LayerCache],
        settings: Settings,
        device: torch.device,
    ) -> None:
        self._ids = model.head.ids
        self._vocab_size = model.config.vocab_size
        self._logits_like = model.head.weight
        self._device = device
        self.slots = SlotTable(settings.max_num_seqs)
        spare_block = len(kv_cache[0].k) - 1
        max_blocks = blocks_per_sequence(settings)
        self._state = DeviceState(settings.max_num_seqs, max_blocks, spare_block, device)
        self.processors = LogitsProcessors(
            settings.max_num_seqs + 1,
            model.config.vocab_size,
            self._ids,
            len(self._logits_like),
            device,
        )
        self._end: torch.cuda.Event | None = None  # of the latest step; None on a CPU
        self._steps = Steps(model, backend, kv_cache, self._state, settings, device)
        self._matchers = SlotMatchers()
        words = num_words(model.config.vocab_size)
        self._masks = MaskBuffers(settings.max_num_seqs, words, device)
        # The latest step that sampled rows with a grammar.
        self._constrained: PendingResult | None = None
        self._graphs: StepGraphs | None = None
        self._whole_draws: list[DrawGraph] = []
        self._masked_draws: list[DrawGraph] = []
        self._processed_draws: list[DrawGraph] = []
        # In results of captured steps, the row that takes what a captured draw has too many.
        self._padding_row = 0

    @torch.inference_mode()
    def capture_graphs(
        self, sizes: Sizes, capture: Capture, progress: Callable[[int, int], None]
    ) -> None:
        """Captures steps of these sizes. From here on, a step that one of them has room for is
        replayed.

        Args:
            capture: turns a step into a function that replays it.
            progress: takes the number of graphs captured, and the number in total.
        """
        steps, device = self._steps, self._device
        rows = max(sizes.decodes[-1], *(layout.samples for layout in sizes.mixed))
        # All steps write to the same results, which the draws after them read and overwrite.
        results = StepOutput(
            torch.zeros(rows + 1, dtype=torch.int64, device=device),
            self._logits_like.new_zeros(rows + 1, len(self._logits_like)),
            torch.full((rows + 1,), self._state.padding_slot, device=device),
        )

        def decode(slots: Tensor) -> StepOutput:
            return steps.decode(slots, first_rows(results, len(slots)))

        def mixed(columns: Tensor, layout: Layout) -> StepOutput:
            out = first_rows(results, layout.samples)
            output = steps.mixed(columns, layout, steps.bounds(layout), out)
            return output._replace(hidden=None)  # or each graph would keep its own

        padding_slot = self._state.padding_slot
        self._graphs = StepGraphs(decode, mixed, sizes, padding_slot, device, capture, progress)
        self._padding_row = rows
        ranks, most = self._ids.tp.size, sizes.decodes[-1]
        processors, (masked, _, masks) = self.processors, self._masks.device
        masked[0], masked[1] = rows, padding_slot

        def padding(share: int) -> Tensor:
            drawn = torch.zeros(2, share * ranks, dtype=torch.int64, device=device)
            drawn[1] = padding_slot
            return drawn

        # These do not refer to this executor, or what only a cycle holds would stay for a while:
        # the group's connections, which tell the other ranks that this one is gone.
        def draw_masked(drawn: Tensor) -> None:
            steps.draw_masked(results, drawn, masks[: drawn.shape[1]])

        def draw_processed(drawn: Tensor) -> None:
            steps.draw_processed(results, drawn, processors)

        share = -(-most // ranks)
        if ranks > 1:
            draw_whole = partial(steps.draw_whole, results)
            self._whole_draws = capture_draws(draw_whole, WHOLE_SHARES, share, padding, capture)
        self._masked_draws = capture_draws(
            draw_masked, MASKED_SIZES, most, lambda size: masked[:, :size], capture
        )
        self._processed_draws = capture_draws(
            draw_processed, PROCESSED_SHARES, share, padding, capture
        )

    def reset(self) -> None:
        """Empties all slots."""
        self.slots.reset()
        self._matchers.reset()

    @torch.inference_mode()
    def step(self, plan: StepPlan, matchers: Mapping[int, Matcher] = NO_MATCHERS) -> PendingResult:
        """Enqueues a step. All ranks must be given the same plans in the same order.

        Args:
            matchers: of the sequences that the plan admits and that have a grammar, by slot.
        """
        batch = self.slots.apply(plan)
        self._matchers.admit(matchers)
        started = self._begin()
        self._state.update(batch)
        self.processors.admit(batch.admitted_processed)
        if not len(batch.query_lens):
            return self._pending(plan.number, NO_TOKENS, None, started)
        output = None
        if self._graphs is not None and not batch.prompt_spans:
            output = self._graphs.replay(batch)
        # Captured draws read what captured steps write.
        replayed = output is not None
        if output is None:
            layout = Layout.of(batch)
            flat = to_device(columns(batch, layout, self._state.padding_slot), self._device)
            lengths = Lengths(batch.query_lens, batch.context_lens)
            output = self._steps.mixed(flat, layout, lengths)
        if len(batch.whole_rows) and self._ids.tp.size > 1:
            draws = self._whole_draws if replayed else []
            self._draw(output, batch, batch.whole_rows, self._steps.draw_whole, draws)
        too_costly = NO_ROWS
        if len(batch.constrained_rows):
            too_costly = self._constrain(output, batch, self._masked_draws if replayed else [])
        if len(batch.processed_rows):
            draw = partial(self._steps.draw_processed, processors=self.processors)
            draws = self._processed_draws if replayed else []
            self._draw(output, batch, batch.processed_rows, draw, draws)
        found = self._logprobs(batch, output.logits, output.token_ids)
        prompt: list[PromptLogprobs] = []
        for span in batch.prompt_spans:
            if output.hidden is None:
                raise ValueError("a captured step keeps no hidden states")
            ids, values = self._steps.prompt_logprobs(output.hidden, span)
            prompt.append(PromptLogprobs(span.first, to_host(ids), to_host(values)))
        token_ids = self._steps.advance(output)
        pending = self._pending(plan.number, token_ids, found, started, prompt)
        if len(batch.constrained_rows):
            pending = self._constrained = pending._replace(too_costly=too_costly)
        return pending

    def _constrain(self, output: StepOutput, batch: Batch, draws: list[DrawGraph]) -> Int32s:
        """Fills the masks of rows with a grammar, while the forward pass runs. These depend on the
        tokens of the step before, which are waited for. Samples the masked rows again, and sets the
        masks of those that are processed.

        Args:
            draws: captured, the fewest rows first.

        Returns:
            The rows whose grammars took too much work.
        """
        if self._constrained is not None:
            self._constrained.wait()  # Then nothing reads the buffers any more.
            if self._matchers.awaits_tokens:
                self._matchers.advance(self._constrained.token_ids.numpy())
        host, device = self._masks.host, self._masks.device
        masked, restricted = len(batch.masked_rows), len(batch.restricted_rows)
        rows = np.concatenate((batch.masked_rows, batch.restricted_rows))
        slots = batch.sampling_slots[rows]
        masks = host.masks[: len(rows)].numpy()
        failed = self._matchers.fill(rows, self._matchers.of(slots), masks)
        self.processors.cut_down(slots[masked:], masks[masked:])
        graph = _with_room(draws, masked)
        drawn = host.drawn.numpy()
        drawn[:, :masked] = rows[:masked], slots[:masked]
        if graph is not None:
            drawn[0, masked : graph.share] = self._padding_row
            drawn[1, masked : graph.share] = self._state.padding_slot
        host.restricted.numpy()[:restricted] = slots[masked:]
        self._masks.upload(len(rows))
        if graph is not None:
            graph.replay()
        elif masked:
            self._steps.draw_masked(output, device.drawn[:, :masked], device.masks[:masked])
        if restricted:
            masks_of_others = device.masks[masked : len(rows)]
            self.processors.restrict(device.restricted[:restricted], masks_of_others)
        return rows[failed]

    def _draw(
        self,
        output: StepOutput,
        batch: Batch,
        rows: Int32s,
        draw: Callable[[StepOutput, Tensor], None],
        draws: list[DrawGraph],
    ) -> None:
        """Samples rows again, which the ranks divide among them.

        Args:
            rows: int32 [w], of the rows that sample.
            draw: enqueues the draw of rows and slots int64 [2, ranks * k].
            draws: captured, the fewest rows first.
        """
        ranks = self._ids.tp.size
        share = -(-len(rows) // ranks)
        graph = _with_room(draws, share)
        # All ranks draw equally many rows, and a graph as many as it has room for: rows are drawn
        # again.
        repeated = np.arange((share if graph is None else graph.share) * ranks) % len(rows)
        drawn = rows[repeated]
        both = np.stack((drawn, batch.sampling_slots[drawn])).astype(np.int64)
        if graph is None:
            draw(output, to_device(both, self._device))
        else:
            graph.drawn.copy_(pinned(both), non_blocking=True)
            graph.replay()

    def _pending(
        self,
        number: int,
        token_ids: Tensor,
        logprobs: SampledLogprobs | None,
        started: torch.cuda.Event | None,
        prompt: Sequence[PromptLogprobs] = (),
    ) -> PendingResult:
        """Enqueues the copies to the host of log-probabilities. The token ids int32 [s] are on
        their way there."""
        if logprobs is not None:
            logprobs = SampledLogprobs(
                logprobs.rows, to_host(logprobs.token_ids), to_host(logprobs.values)
            )
        self._end = _event(self._device)
        return PendingResult(number, token_ids, logprobs, started, self._end, self._ids.tp, prompt)

    def _begin(self) -> torch.cuda.Event | None:
        """This point of the device's queue, or the end of the step before, if that still runs: each
        event takes the device more than a µs. None on a CPU."""
        if self._end is not None and not self._end.query():  # type: ignore[no-untyped-call]
            return self._end
        return _event(self._device)

    def _logprobs(self, batch: Batch, logits: Tensor, token_ids: Tensor) -> SampledLogprobs | None:
        rows = batch.wants_logprobs
        if not rows:
            return None
        chosen = to_device(np.array([row for row, _ in rows]), logits.device)
        most = min(max(count for _, count in rows), self._vocab_size)
        ids, values = logprobs(logits[chosen], token_ids[chosen], most, self._ids)
        return SampledLogprobs(rows, ids.int(), values)


def _with_room(draws: list[DrawGraph], share: int) -> DrawGraph | None:
    """The smallest draw of so many rows a rank; None for no rows."""
    return next((draw for draw in draws if draw.share >= share > 0), None)


def _event(device: torch.device) -> torch.cuda.Event | None:
    """An event for this point of the device's queue; None on a CPU."""
    if device.type != "cuda":
        return None
    # Blocking: a thread that waits for the event sleeps, and does not spin.
    event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
