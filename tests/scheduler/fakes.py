"""The scheduler's neighbours, in memory: each checks all that it is told."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from nanovllm.messages import (
    Admission,
    Begin,
    End,
    Finished,
    GroupReady,
    Message,
    NewTokens,
    Reset,
    RowLogprobs,
    StepPlan,
    StepResult,
    Submit,
    TokenLogprobs,
    pack,
    unpack,
    unpack_int64,
)
from nanovllm.protocol import FinishReason

VOCABULARY = 50


def next_token(seed: int | None, position: int) -> int:
    """What the fake model samples: a function of seed and position, as on a real device."""
    return hash((seed, position, 12345)) % VOCABULARY


def root_state(salt: str) -> int:
    """What KV depends on before the first token."""
    return hash(tuple(salt.encode()))


def next_state(state: int, token: int) -> int:
    """What KV depends on after one more token: all before it."""
    return hash((state, token))


@dataclass
class Request:
    """One attempt, and what must come of it."""

    submit: Submit
    arrival: int
    expected: list[int] = field(init=False)
    reason: FinishReason = "length"
    completion_tokens: int = 0

    def __post_init__(self) -> None:
        sampling = self.submit.sampling
        self.expected = unpack(self.submit.output).tolist()
        for count, token in enumerate(self.expected[: sampling.max_tokens], 1):
            if token in sampling.stop_token_ids:
                self.reason, self.completion_tokens = "stop", count
                return
        while len(self.expected) < sampling.max_tokens:
            position = len(self.submit.prompt) // 4 + len(self.expected)
            token = next_token(sampling.seed, position)
            self.expected.append(token)
            if token in sampling.stop_token_ids:
                self.reason = "stop"
                break
        self.completion_tokens = min(len(self.expected), sampling.max_tokens)


@dataclass
class WorkerSlot:
    """A slot as a worker has it. `states[p]` stands for the KV of position p: it depends on the
    salt and on all tokens up to p."""

    seed: int | None
    tokens: list[int]
    states: list[int]
    blocks: list[int]
    logprobs: bool
    computed: int
    num_tokens: int
    most_tokens: int


class FakeWorker:
    """Rank 0 of a group that runs each plan when told to, and looks at every KV position it reads.

    Args:
        requests: by seed, which is unique: for the salt and the limits that a plan does not carry.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        requests: dict[int | None, Request],
        *,
        depth: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prefill_tokens: int,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.slots: dict[int, WorkerSlot] = {}
        self.inbox: deque[Message] = deque()
        self.outbox: deque[StepResult] = deque()
        self.kept: deque[StepResult] = deque(maxlen=depth)
        self.plans: list[StepPlan] = []
        self.step_us = 0  # the device's time for a step
        self._busy_us = 0
        self.admitted_seeds: list[int | None] = []
        self._requests = requests
        self._depth = depth
        self._max_num_seqs = max_num_seqs
        self._budget = max_num_batched_tokens
        self._prefill_budget = max_prefill_tokens
        self._cache: dict[tuple[int, int], int] = {}
        self._next: int | None = None
        # Blocks that plans write whose result the scheduler has not had yet.
        self._written: dict[int, set[int]] = {}

    @property
    def waits_for_reset(self) -> bool:
        return self._next is None

    def is_at(self, number: int) -> bool:
        """Whether it has run all plans before this one."""
        return self._next == number

    def announcement(self) -> GroupReady:
        return GroupReady(self.num_blocks, self.block_size)

    def work(self) -> None:
        """Takes the next message in."""
        message = self.inbox.popleft()
        if isinstance(message, Reset):
            if self._next is None or message.number >= self._next:
                self.slots.clear()
                self._next = message.number
        elif isinstance(message, StepPlan) and message.number == self._next:
            self._next += 1
            self._run(message)

    def kv(self, block: int, offset: int) -> int | None:
        """What was last written there."""
        return self._cache.get((block, offset))

    def heard(self, result: StepResult) -> None:
        """The scheduler has this result."""
        self._written.pop(result.number, None)

    def disconnect(self) -> None:
        """What was on its way is lost, both ways."""
        self.inbox.clear()
        self.outbox.clear()

    def reconnect(self) -> None:
        self.outbox = deque(self.kept)

    def _run(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        assert len(self._written) < self._depth, "too many plans in flight"
        for slot in unpack(plan.release).tolist():
            del self.slots[slot]
        fresh: set[int] = set()
        for admission in plan.admit:
            fresh.update(self._admit(admission))
        for slot, block in unpack(plan.append).reshape(-1, 2).tolist():
            self.slots[slot].blocks.append(block)
            fresh.add(block)
        for written in self._written.values():
            assert not fresh & written, "a block was taken while rows in flight write it"

        decode = unpack(plan.decode).tolist()
        chunks = unpack(plan.prefill).reshape(-1, 3).tolist()
        used = decode + [slot for slot, _, _ in chunks]
        assert len(set(used)) == len(used), "a slot twice in one step"
        prefill_tokens = sum(length for _, _, length in chunks)
        assert len(decode) + prefill_tokens <= self._budget
        assert not decode or prefill_tokens <= self._prefill_budget

        written_now: set[int] = set()
        rows: list[int] = []
        for slot in decode:
            state = self.slots[slot]
            assert state.computed == state.num_tokens - 1, "decodes before its prefill is complete"
            self._compute(slot, state.num_tokens - 1, 1, written_now)
            rows.append(slot)
        for slot, start, length in chunks:
            state = self.slots[slot]
            assert length > 0
            assert start == state.computed, "a gap in the prefill"
            self._compute(slot, start, length, written_now)
            if start + length == state.num_tokens:
                rows.append(slot)
        for slot in used:
            self._check(slot)
        self._written[plan.number] = written_now
        self._sample(plan.number, rows)

    def _admit(self, admission: Admission) -> list[int]:
        assert admission.slot not in self.slots, "the slot is taken"
        assert 0 <= admission.slot < self._max_num_seqs
        tokens = unpack(admission.tokens).tolist()
        blocks: list[int] = unpack(admission.blocks).tolist()
        request = self._requests[admission.sampling.seed]
        slot = WorkerSlot(
            seed=admission.sampling.seed,
            tokens=tokens,
            states=[],
            blocks=blocks,
            logprobs=admission.sampling.logprobs is not None,
            computed=admission.computed,
            num_tokens=len(tokens),
            most_tokens=len(request.submit.prompt) // 4 + request.submit.sampling.max_tokens,
        )
        state = root_state(request.submit.cache_salt)
        for token in tokens:
            state = next_state(state, token)
            slot.states.append(state)
        assert admission.tokens[: 4 * admission.prompt_tokens] == request.submit.prompt
        assert admission.computed < len(tokens), "nothing left to compute"
        assert admission.computed % self.block_size == 0
        assert len(blocks) == -(-len(tokens) // self.block_size)
        self.slots[admission.slot] = slot
        self.admitted_seeds.append(admission.sampling.seed)
        return blocks[admission.computed // self.block_size :]

    def _read(self, slot: WorkerSlot, position: int) -> int | None:
        block = slot.blocks[position // self.block_size]
        return self.kv(block, position % self.block_size)

    def _compute(self, number: int, start: int, length: int, written: set[int]) -> None:
        slot = self.slots[number]
        for position in range(start, start + length):
            block = slot.blocks[position // self.block_size]
            assert 0 <= block < self.num_blocks
            for other, theirs in self.slots.items():
                to_write = theirs.blocks[theirs.computed // self.block_size :]
                assert other == number or block not in to_write, "written by two"
            self._cache[block, position % self.block_size] = slot.states[position]
            written.add(block)
        slot.computed = start + length

    def _check(self, number: int) -> None:
        """After all keys and values of the step are stored, as on a device: a row may read what
        another row of its step has computed."""
        slot = self.slots[number]
        for position in range(slot.computed):
            assert self._read(slot, position) == slot.states[position], "another's KV"

    def _sample(self, number: int, rows: list[int]) -> None:
        token_ids: list[int] = []
        logprobs: list[RowLogprobs] = []
        for row, index in enumerate(rows):
            slot = self.slots[index]
            token = next_token(slot.seed, slot.num_tokens)
            slot.tokens.append(token)
            slot.states.append(next_state(slot.states[-1], token))
            slot.num_tokens += 1
            assert slot.num_tokens <= slot.most_tokens, "planned past max_tokens"
            token_ids.append(token)
            if slot.logprobs:
                logprobs.append(RowLogprobs(row, TokenLogprobs(pack([token]), b"")))
        self._busy_us += self.step_us
        result = StepResult(number, pack(token_ids), logprobs, self._busy_us, 0)
        self.outbox.append(result)
        self.kept.append(result)


@dataclass
class FakeOutput:
    attempt: int
    tokens: list[int]
    finished: Finished | None = None


class FakeDetokenizer:
    """Decodes outputs like a real one, and accepts neither gap nor repetition."""

    def __init__(self, requests: dict[tuple[int, int], Request]) -> None:
        self.outputs: dict[int, FakeOutput] = {}
        self._requests = requests
        # Ended on this connection: steps on their way may name them still.
        self._ended: dict[int, int] = {}

    def scheduler_up(self) -> None:
        self.outputs.clear()
        self._ended.clear()

    def take(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if isinstance(message, Begin):
                self._begin(message)
            elif isinstance(message, NewTokens):
                self._new_tokens(message)
            elif isinstance(message, Finished):
                self._finished(message)
            elif isinstance(message, End):
                self._end(message)
            else:
                raise TypeError(message)

    def _begin(self, begin: Begin) -> None:
        request = self._requests[begin.uid, begin.attempt]
        tokens = unpack(begin.output).tolist()
        assert tokens == request.expected[: len(tokens)]
        assert begin.prompt_tokens == len(request.submit.prompt) // 4
        assert 0 <= begin.cached_tokens <= begin.prompt_tokens
        assert begin.resumed == request.submit.resumed
        if begin.token_logprobs:
            of = [int(unpack(entry.token_ids)[0]) for entry in begin.token_logprobs]
            assert of == tokens[-len(of) :]
        assert begin.attempt > self._ended.get(begin.uid, -1), "it was ended"
        output = self.outputs.get(begin.uid)
        if output is None or output.attempt < begin.attempt:
            self.outputs[begin.uid] = FakeOutput(begin.attempt, tokens)
        else:
            assert output.attempt == begin.attempt
            assert len(tokens) >= len(output.tokens)
            output.tokens = tokens

    def _end(self, end: End) -> None:
        self._ended[end.uid] = end.attempt
        output = self.outputs.get(end.uid)
        if output is not None:
            assert output.attempt <= end.attempt, "an end of an older attempt"
            del self.outputs[end.uid]

    def _decoded(self, uid: int, attempt: int) -> FakeOutput | None:
        """The output of this attempt; None if it was ended."""
        output = self.outputs.get(uid)
        if output is None or output.attempt > attempt:
            assert attempt <= self._ended.get(uid, -1), "never begun"
            return None
        assert output.attempt == attempt
        return output

    def _new_tokens(self, message: NewTokens) -> None:
        columns = [unpack(c).tolist() for c in (message.attempts, message.offsets)]
        token_ids = unpack(message.token_ids).tolist()
        logprobs = dict(zip(unpack(message.logprob_rows).tolist(), message.logprobs, strict=True))
        for row, (uid, attempt, offset, token) in enumerate(
            zip(unpack_int64(message.uids), *columns, token_ids, strict=True)
        ):
            output = self._decoded(uid, attempt)
            if output is None:
                continue
            assert output.finished is None
            assert offset == len(output.tokens), "a gap or a repetition"
            request = self._requests[uid, attempt]
            assert token == request.expected[offset], "another's token"
            output.tokens.append(token)
            wanted = request.submit.sampling.logprobs is not None
            assert wanted == (row in logprobs)
            if wanted:
                assert unpack(logprobs[row].token_ids)[0] == token

    def _finished(self, message: Finished) -> None:
        output = self._decoded(message.uid, message.attempt)
        if output is None:
            return
        request = self._requests[message.uid, message.attempt]
        assert output.tokens == request.expected
        assert message.reason == request.reason
        assert message.completion_tokens == request.completion_tokens
        output.finished = message
