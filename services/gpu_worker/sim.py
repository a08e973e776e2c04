"""`--device sim`: the timing and interface of a device without a model, to measure the pipeline.

The device runs one step after another, and each takes a fixed time. A token is a well-mixed
function of (seed, position), so that a sequence is the same however it was batched, preempted or
resumed.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanovllm.grammars import Masks, Matcher
from nanovllm.messages import (
    TOO_COSTLY,
    PromptPart,
    RowLogprobs,
    StepPlan,
    StepResult,
    TokenLogprobs,
    pack,
)
from nanovllm.services.gpu_worker.matchers import SlotMatchers
from nanovllm.services.gpu_worker.memory import blocks_per_sequence, check_room_for_one
from nanovllm.services.gpu_worker.runner import Loaded, Report
from nanovllm.services.gpu_worker.sim_tokens import Choice, draw, draw_of, rules_tokens_out
from nanovllm.services.gpu_worker.slots import Batch, Int32s, PromptSpan, SlotTable
from nanovllm.settings import Settings
from nanovllm.timer import Timer

# Every integer below it is a float32: 16.8 s in µs.
STAMP_MODULO = 1 << 24

_NO_MASKS: Masks = np.empty((0, 1), dtype=np.int32)


class SimRunner:
    """Implements `Runner`.

    A step with rows that have a grammar is like a device's: the masks depend on the tokens of the
    step before, which are known when that has ended; and the step ends once the masks are there.
    The scheduler's need of a result comes before that of the next masks.

    Args:
        vocabulary: int32 [v], the token ids to draw from.
    """

    def __init__(self, settings: Settings, vocabulary: NDArray[np.int32]) -> None:
        num_blocks = settings.num_kvcache_blocks
        if num_blocks < 0:
            num_blocks = settings.max_num_seqs * blocks_per_sequence(settings)
        check_room_for_one(num_blocks, settings)
        self._slots = SlotTable(settings.max_num_seqs)
        self._seeds = np.zeros(settings.max_num_seqs, dtype=np.int64)
        self._vocabulary = vocabulary
        self._choices: dict[int, Choice] = {}  # of the slots whose requests rule tokens out
        self._matchers = SlotMatchers()
        self._start = time.monotonic()
        self._device = SimDevice(settings.sim_step_ms / 1000, self._start)
        self._timer = Timer()
        # Steps whose end is not known: the result of an earlier one, whose tokens masks need, is
        # not taken yet.
        self._queue: deque[QueuedStep] = deque()
        # Reports and when each is due. Steps end in the order of their launch.
        loaded = Loaded(num_blocks, f"sim, {settings.sim_step_ms:g} ms a step")
        self._coming: deque[tuple[float, Report]] = deque([(self._start, loaded)])
        self._sampled = np.empty(0, dtype=np.int32)  # by the latest step with masks
        self._wake_at = math.inf
        self._set_timer()

    @property
    def descriptor(self) -> int:
        return self._timer.descriptor

    @property
    def slots_used(self) -> int:
        return self._slots.used

    def join(self, port: int) -> None:
        """Does nothing: simulated ranks form no process group."""

    def launch(self, plan: StepPlan, matchers: Mapping[int, Matcher]) -> None:
        now = time.monotonic()
        batch = self._slots.apply(plan)
        self._matchers.admit(matchers)
        for admission in plan.admit:
            if (seed := admission.sampling.seed) is None:
                raise ValueError(f"the admission to slot {admission.slot} has no seed")
            self._seeds[admission.slot] = seed
        for admission in batch.admitted_processed:
            slot = admission.slot
            self._choices.pop(slot, None)
            if rules_tokens_out(admission):
                self._choices[slot] = Choice.of(admission, self._vocabulary, matchers.get(slot))
        slots = batch.sampling_slots[batch.constrained_rows]
        step = QueuedStep(
            plan.number,
            now,
            batch,
            self._seeds[batch.sampling_slots],
            {
                row: self._choices[slot]
                for row in batch.processed_rows.tolist()
                if (slot := int(batch.sampling_slots[row])) in self._choices
            },
            self._matchers.of(slots),
        )
        self._queue.append(step)
        self._run()
        self._set_timer()

    def reset(self) -> None:
        self._slots.reset()
        self._matchers.reset()

    def reports(self) -> list[Report]:
        now = time.monotonic()
        if now < self._wake_at:
            return []
        reports: list[Report] = []
        while self._coming and self._coming[0][0] <= now:
            reports.append(self._coming.popleft()[1])
        if reports and self._queue:
            return reports  # The timer stays readable: masks are filled once these are sent.
        self._timer.clear()
        self._run()
        self._set_timer()
        return reports

    def _set_timer(self) -> None:
        """The next wake-up: when a report is due, or tokens are known that masks depend on."""
        wake_at = self._coming[0][0] if self._coming else math.inf
        if self._queue:
            wake_at = min(wake_at, self._device.free_at)
        if wake_at != self._wake_at:
            self._wake_at = wake_at
            if wake_at < math.inf:
                self._timer.set(wake_at)

    def _run(self) -> None:
        """Runs the queued steps. One with masks runs once all results before it are taken."""
        while self._queue:
            step, masks_at = self._queue[0], 0.0
            if step.matchers and self._coming:
                return
            self._queue.popleft()
            masks, failed = _NO_MASKS, np.array([], dtype=np.int32)
            rows = step.batch.constrained_rows
            if step.matchers:
                if self._matchers.awaits_tokens:
                    self._matchers.advance(self._sampled)
                masks = np.empty((len(rows), step.matchers[0].words), dtype=np.int32)
                failed = rows[self._matchers.fill(rows, step.matchers, masks)]
                masks_at = time.monotonic()
            self._finish(step, masks, failed, self._device.launch(step.launched_at, masks_at))

    def _finish(self, step: QueuedStep, masks: Masks, failed: Int32s, ran: SimStep) -> None:
        """Draws the tokens of a step, and reports them when the step ends."""
        batch = step.batch
        indices = draw(step.seeds, batch.sampled_positions, len(self._vocabulary))
        token_ids = self._vocabulary[indices]
        if len(masks):
            rows = batch.constrained_rows
            token_ids[rows] = draw_of(masks, step.seeds[rows], batch.sampled_positions[rows])
            self._sampled = token_ids
        if step.choices:
            mask_of_row = dict(zip(batch.constrained_rows.tolist(), masks, strict=True))
            for row, choice in step.choices.items():
                token_ids[row] = choice.draw(
                    step.seeds[row], batch.sampled_positions[row], mask_of_row.get(row)
                )
        token_ids[failed] = TOO_COSTLY
        result = StepResult(
            number=step.number,
            token_ids=pack(token_ids),
            logprobs=self._logprobs(batch, token_ids, indices, ran.end),
            busy_us=round(ran.busy * 1e6),
            at_us=round((ran.end - self._start) * 1e6),
            prompt_parts=[_prompt_part(span) for span in batch.prompt_spans],
        )
        self._coming.append((ran.end, result))

    def _logprobs(
        self, batch: Batch, token_ids: Int32s, indices: NDArray[np.int64], end: float
    ) -> list[RowLogprobs]:
        """The likeliest tokens are the chosen one and others, each half as likely as the last.

        The value of the chosen token is no probability but a time stamp, which tells the lag from
        device to client: minus `end` in µs, modulo STAMP_MODULO.
        """
        stamp = -(int(end * 1e6) % STAMP_MODULO)
        found = []
        for row, count in batch.wants_logprobs:
            ranks = np.arange(count)
            others = self._vocabulary[(indices[row] + ranks) % len(self._vocabulary)]
            tokens = np.concatenate((token_ids[row : row + 1], others))
            values = np.concatenate(([stamp], (ranks + 1) * -np.log(2))).astype("<f4")
            found.append(RowLogprobs(row, TokenLogprobs(pack(tokens), values.tobytes())))
        return found


def _prompt_part(span: PromptSpan) -> PromptPart:
    """Each prompt token as the likeliest of tokens that follow it in the vocabulary, each half as
    likely as the last."""
    ranks = np.arange(span.likeliest + 1, dtype=np.int32)
    ids = span.token_ids[:, None] + np.maximum(ranks - 1, 0)
    values = np.broadcast_to(-np.maximum(ranks, 1) * np.log(2), ids.shape).astype("<f4")
    return PromptPart(span.first, len(ranks), pack(ids), values.tobytes())


class QueuedStep(NamedTuple):
    """A step that was launched: what it needs of its slots as they were then.

    Attributes:
        seeds: int64 [s], of the rows that sample.
        choices: of rows whose requests rule tokens out.
        matchers: of the batch's rows with a grammar.
    """

    number: int
    launched_at: float
    batch: Batch
    seeds: NDArray[np.int64]
    choices: dict[int, Choice]
    matchers: list[Matcher]


class SimStep(NamedTuple):
    """When a step ends, and how long the device has been busy by then, both in seconds."""

    end: float
    busy: float


class SimDevice:
    """A queue of steps of equal length. A step starts when the step before it has ended.

    Attributes:
        free_at: when the last of the steps so far ends.

    Ends are computed, not observed. So a host that notices an end late makes the device neither
    slower nor seemingly busier.
    """

    def __init__(self, step_s: float, start: float) -> None:
        self._step = step_s
        self.free_at = start
        self._launched = 0

    def launch(self, now: float, masks_at: float = 0.0) -> SimStep:
        """A step that was launched at `now`, and that does not end before its masks are there; the
        device waits for these idly."""
        self.free_at = max(max(self.free_at, now) + self._step, masks_at)
        self._launched += 1
        return SimStep(self.free_at, self._launched * self._step)
