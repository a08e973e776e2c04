"""`--device sim`: the timing and interface of a device without a model, to measure the pipeline.

The device runs one step after another, and each takes a fixed time. A token is a well-mixed
function of (seed, position), so that a sequence is the same however it was batched, preempted or
resumed.
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanovllm.checkpoint import CheckpointError, ModelConfig
from nanovllm.messages import (
    NO_TOKEN_LEFT,
    Admission,
    PromptPart,
    RowLogprobs,
    StepPlan,
    StepResult,
    TokenLogprobs,
    pack,
)
from nanovllm.services.gpu_worker.memory import blocks_per_sequence, check_room_for_one
from nanovllm.services.gpu_worker.runner import Loaded, Report
from nanovllm.services.gpu_worker.slots import Batch, PromptSpan, SlotTable
from nanovllm.settings import Settings
from nanovllm.timer import Timer
from nanovllm.vocabulary import Vocabulary

_SEED_FACTOR = np.uint64(0xD1342543DE82EF95)
_POSITION_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
# Every integer below it is a float32: 16.8 s in µs.
STAMP_MODULO = 1 << 24


class SimRunner:
    """Implements `Runner`.

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
        self._start = time.monotonic()
        self._device = SimDevice(settings.sim_step_ms / 1000, self._start)
        self._timer = Timer()
        # Reports and when each is due. Steps end in the order of their launch.
        loaded = Loaded(num_blocks, f"sim, {settings.sim_step_ms:g} ms a step")
        self._coming: deque[tuple[float, Report]] = deque([(self._start, loaded)])
        self._timer.set(self._start)

    @property
    def descriptor(self) -> int:
        return self._timer.descriptor

    @property
    def slots_used(self) -> int:
        return self._slots.used

    def join(self, port: int) -> None:
        """Does nothing: simulated ranks form no process group."""

    def launch(self, plan: StepPlan) -> None:
        step = self._device.launch(time.monotonic())
        batch = self._slots.apply(plan)
        for admission in plan.admit:
            if (seed := admission.sampling.seed) is None:
                raise ValueError(f"the admission to slot {admission.slot} has no seed")
            self._seeds[admission.slot] = seed
        for admission in batch.admitted_processed:
            self._choices[admission.slot] = Choice.of(admission, self._vocabulary)
        indices = draw(
            self._seeds[batch.sampling_slots],
            batch.sampled_positions,
            len(self._vocabulary),
        )
        token_ids = self._vocabulary[indices]
        for row in batch.processed_rows.tolist():
            slot, position = batch.sampling_slots[row], batch.sampled_positions[row]
            token_ids[row] = self._choices[int(slot)].draw(self._seeds[slot], position)
        result = StepResult(
            number=plan.number,
            token_ids=pack(token_ids),
            logprobs=self._logprobs(batch, indices, step.end),
            busy_us=round(step.busy * 1e6),
            at_us=round((step.end - self._start) * 1e6),
            prompt_parts=[_prompt_part(span) for span in batch.prompt_spans],
        )
        self._coming.append((step.end, result))
        if len(self._coming) == 1:
            self._timer.set(step.end)

    def reset(self) -> None:
        self._slots.reset()

    def reports(self) -> list[Report]:
        now = time.monotonic()
        if not self._coming or self._coming[0][0] > now:
            return []
        self._timer.clear()
        reports: list[Report] = []
        while self._coming and self._coming[0][0] <= now:
            reports.append(self._coming.popleft()[1])
        if self._coming:
            self._timer.set(self._coming[0][0])
        return reports

    def _logprobs(self, batch: Batch, indices: NDArray[np.int64], end: float) -> list[RowLogprobs]:
        """The likeliest tokens are the chosen one and others, each half as likely as the last.

        The value of the chosen token is no probability but a time stamp, which tells the lag from
        device to client: minus `end` in µs, modulo STAMP_MODULO.
        """
        stamp = -(int(end * 1e6) % STAMP_MODULO)
        found = []
        for row, count in batch.wants_logprobs:
            ranks = np.arange(count)
            others = self._vocabulary[(indices[row] + ranks) % len(self._vocabulary)]
            tokens = np.concatenate((self._vocabulary[indices[row : row + 1]], others))
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


class Choice(NamedTuple):
    """What a sequence draws from. There are no logits, so that penalties and bias, and bad words of
    several tokens, change nothing.

    Attributes:
        early, later: int32, the tokens for positions before `min_length`, and from there on.
    """

    early: NDArray[np.int32]
    later: NDArray[np.int32]
    min_length: int

    @classmethod
    def of(cls, admission: Admission, vocabulary: NDArray[np.int32]) -> Choice:
        sampling = admission.sampling
        later = vocabulary
        if sampling.allowed_token_ids is not None:
            later = np.array(sorted({*sampling.allowed_token_ids}), dtype=np.int32)
        bad = [word[0] for word in sampling.bad_words if len(word) == 1]
        later = np.setdiff1d(later, np.array(bad, dtype=np.int32))
        stops = np.array(sampling.stop_token_ids, dtype=np.int32)
        min_length = admission.prompt_tokens + sampling.min_tokens
        return cls(np.setdiff1d(later, stops), later, min_length)

    def draw(self, seed: np.int64, position: np.int32) -> int:
        tokens = self.early if position < self.min_length else self.later
        if not len(tokens):
            return NO_TOKEN_LEFT
        return int(tokens[draw(np.array([seed]), np.array([position]), len(tokens))[0]])


class SimStep(NamedTuple):
    """When a step ends, and how long the device has been busy by then, both in seconds."""

    end: float
    busy: float


class SimDevice:
    """A queue of steps of equal length. A step starts when the step before it has ended.

    Ends are computed, not observed. So a host that notices an end late makes the device neither
    slower nor seemingly busier.
    """

    def __init__(self, step_s: float, start: float) -> None:
        self._step = step_s
        self._free_at = start
        self._launched = 0

    def launch(self, now: float) -> SimStep:
        self._free_at = max(self._free_at, now) + self._step
        self._launched += 1
        return SimStep(self._free_at, self._launched * self._step)


def draw(seeds: NDArray[np.int64], positions: NDArray[np.int32], size: int) -> NDArray[np.int64]:
    """An index in [0, size) for each (seed, position): the finalizer of splitmix64 (Steele et al.,
    2014) over the sum of both, each times an odd constant, modulo 2**64."""
    x = seeds.view(np.uint64) * _SEED_FACTOR + positions.astype(np.uint64) * _POSITION_FACTOR
    x = (x ^ (x >> _SHIFTS[0])) * _FACTORS[0]
    x = (x ^ (x >> _SHIFTS[1])) * _FACTORS[1]
    indices: NDArray[np.int64] = ((x ^ (x >> _SHIFTS[2])) % np.uint64(size)).astype(np.int64)
    return indices


def ordinary_tokens(directory: Path, config: ModelConfig) -> NDArray[np.int32]:
    """int32 [v], the ids of tokens that are text: neither special nor an end of sequence.

    Raises CheckpointError if the tokenizer cannot be read, or has no such token.
    """
    special = set(config.eos_token_ids or ())
    known = Vocabulary.from_checkpoint(directory).text.keys() & range(config.vocab_size)
    if not known - special:
        raise CheckpointError(f"{directory} has no token that is not special")
    return np.array(sorted(known - special), dtype=np.int32)
