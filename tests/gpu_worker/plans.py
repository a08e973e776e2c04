"""Step plans made by hand and at random. Lengths are known beforehand, so a whole schedule is."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from nanovllm.grammars import Grammars, Matcher
from nanovllm.messages import Admission, StepPlan, StepResult, pack, unpack
from nanovllm.protocol import Sampling, StructuredOutputs

GREEDY = Sampling(temperature=0.0, seed=0)
END = 256
GRAMMARS = Grammars({i: bytes([i]) for i in range(256)}, {END: b"<end>"}, [END], 515)
ASKED = StructuredOutputs(regex="([a-c]|[x-z]{3})*!?")


def step_plan(
    number: int,
    *,
    release: Iterable[int] = (),
    admit: Iterable[Admission] = (),
    append: Iterable[tuple[int, int]] = (),
    prefill: Iterable[tuple[int, int, int]] = (),
    decode: Iterable[int] = (),
) -> StepPlan:
    def rows(values: Iterable[tuple[int, ...]]) -> bytes:
        return pack(value for row in values for value in row)

    return StepPlan(number, pack(release), list(admit), rows(append), rows(prefill), pack(decode))


def constrain(plan: StepPlan) -> dict[int, Matcher]:
    """Gives a grammar to each sequence admitted whose seed is divisible by three. Returns the
    matchers by slot."""
    matchers: dict[int, Matcher] = {}
    for i, admission in enumerate(plan.admit):
        if (number := admission.sampling.seed or 0) % 3 == 0:
            plan.admit[i] = msgspec.structs.replace(admission, matcher=number)
            matchers[admission.slot] = GRAMMARS.matcher(ASKED)
    return matchers


class Request(NamedTuple):
    prompt: list[int]
    max_tokens: int
    sampling: Sampling = GREEDY


class Scheduled(NamedTuple):
    """A plan, and which request each row of its result belongs to."""

    plan: StepPlan
    owners: list[int]


class _Running:
    def __init__(self, request: int, slot: int, length: int) -> None:
        self.request = request
        self.slot = slot
        self.length = length  # of the sequence, sampled tokens included
        self.computed = 0
        self.blocks: list[int] = []


def random_schedule(
    requests: Sequence[Request],
    rng: random.Random,
    *,
    slots: int,
    blocks: int,
    block_size: int,
    largest_chunk: int,
    first: int = 0,
) -> list[Scheduled]:
    """Runs all requests: slots and blocks are taken in any order and taken again, prompts come in
    chunks of any size, blocks are added as late as possible, and rows are left out now and then."""
    free_slots, free_blocks = list(range(slots)), list(range(blocks))
    rng.shuffle(free_slots)
    rng.shuffle(free_blocks)
    reserved = 0
    waiting = list(range(len(requests)))
    running: list[_Running] = []
    to_release: list[int] = []
    schedule: list[Scheduled] = []

    def blocks_of(request: int) -> int:
        asked = requests[request]
        return -(-(len(asked.prompt) + asked.max_tokens) // block_size)

    while waiting or running:
        admit, append, prefill = [], [], []
        release, to_release = to_release, []
        while waiting and free_slots and reserved + blocks_of(waiting[0]) <= blocks:
            index = waiting.pop(0)
            asked = requests[index]
            sequence = _Running(index, free_slots.pop(), len(asked.prompt))
            sequence.blocks = [free_blocks.pop() for _ in range(rng.choice((0, 1)))]
            reserved += blocks_of(index)
            running.append(sequence)
            tokens, table = pack(asked.prompt), pack(sequence.blocks)
            admit.append(
                Admission(sequence.slot, tokens, len(asked.prompt), table, 0, asked.sampling)
            )
        decode: list[_Running] = []
        completed: list[_Running] = []
        for sequence in rng.sample(running, len(running)):
            if len(running) > 1 and rng.random() < 0.2:
                continue
            left = len(requests[sequence.request].prompt) - sequence.computed
            length = rng.randint(1, min(left, largest_chunk)) if left > 0 else 1
            if left > 0:
                prefill.append((sequence.slot, sequence.computed, length))
                if length == left:
                    completed.append(sequence)
            else:
                decode.append(sequence)
            sequence.computed += length
            while len(sequence.blocks) * block_size < sequence.computed:
                sequence.blocks.append(free_blocks.pop())
                append.append((sequence.slot, sequence.blocks[-1]))
        schedule.append(
            Scheduled(
                step_plan(
                    first + len(schedule),
                    release=release,
                    admit=admit,
                    append=append,
                    prefill=prefill,
                    decode=[sequence.slot for sequence in decode],
                ),
                [sequence.request for sequence in decode + completed],
            )
        )
        for sequence in decode + completed:
            asked = requests[sequence.request]
            sequence.length += 1
            if sequence.length == len(asked.prompt) + asked.max_tokens:
                running.remove(sequence)
                to_release.append(sequence.slot)
                free_slots.append(sequence.slot)
                free_blocks += sequence.blocks
                reserved -= blocks_of(sequence.request)
    return schedule


def outputs(
    schedule: Sequence[Scheduled], results: Sequence[StepResult], requests: int
) -> list[list[int]]:
    """The tokens that each request got."""
    found: list[list[int]] = [[] for _ in range(requests)]
    for scheduled, result in zip(schedule, results, strict=True):
        assert result.number == scheduled.plan.number
        tokens = unpack(result.token_ids).tolist()
        for owner, token in zip(scheduled.owners, tokens, strict=True):
            found[owner].append(token)
    return found


def floats(raw: bytes) -> NDArray[np.float32]:
    return np.frombuffer(raw, dtype="<f4")
