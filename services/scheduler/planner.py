"""Plans steps: admission, prefill chunks, decodes, preemption; and commits their results."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import NamedTuple

import msgspec
import numpy as np

from nanovllm.block_names import TOKEN_BYTES
from nanovllm.messages import NO_TOKEN_LEFT, TOO_COSTLY, Admission, InHand, Prepared, pack, unpack
from nanovllm.services.scheduler.blocks import BlockManager, root
from nanovllm.services.scheduler.preparations import Preparations
from nanovllm.services.scheduler.sequences import NO_SLOT, OutputEnd, Sequence
from nanovllm.services.scheduler.slots import Indices, Ints, Slots
from nanovllm.services.scheduler.steps import Draft, Ended, Sampled, Step
from nanovllm.settings import Settings

log = logging.getLogger(__name__)

# While sequences run, an admission leaves them this share of the blocks. Otherwise the new sequence
# would soon be preempted, when those that run need their next blocks.
RESERVE = 1 / 100


class Leftover(NamedTuple):
    """Blocks of a sequence that left its slot with rows in flight."""

    until: int  # the plan after whose result the blocks are free
    blocks: list[int]


class StepPlanner:
    """Waiting and running sequences, and the blocks that they hold.

    First come, first served: sequences are admitted in the order of `waiting`, and the sequence
    admitted last is preempted, to the front of `waiting`. So every running sequence came before
    every waiting one.
    """

    def __init__(self, settings: Settings, preparations: Preparations) -> None:
        self._settings = settings
        self._preparations = preparations
        self.slots = Slots(settings.max_num_seqs, settings.max_model_len)
        self.blocks = BlockManager(0, settings.kvcache_block_size)
        # Sequences by uid: those that wait, preempted ones included, in the order of their turns;
        # and those in slots that are not preempted, in the order of admission.
        self.waiting: OrderedDict[int, Sequence] = OrderedDict()
        self.running: dict[int, Sequence] = {}
        # The sequences that finished since the core emptied this list.
        self.ended: list[Ended] = []
        self.preemptions = 0
        # Outputs that ended because their logits were not finite.
        self.failed = 0
        # Of all sequences admitted so far.
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self._prefilling: dict[int, Sequence] = {}
        # Sequences preempted with rows in flight: in `waiting` already, and still in their slots.
        self._draining: dict[int, Sequence] = {}
        self._leftovers: list[Leftover] = []
        self._committed = -1  # the latest plan whose result has come
        # The uid that could not be admitted for want of blocks, and `blocks.releases` of then.
        self._stuck: tuple[int, int] | None = None

    def reset(self, num_blocks: int, block_size: int, next_plan: int) -> None:
        """There is a new worker group: running sequences wait again, and the cache is empty."""
        for sequence in reversed(self.running.values()):
            self._to_the_front(sequence)
        for resident in [s for s in self.slots.sequences if s is not None]:
            self.slots.vacate(resident)
            resident.blocks = []
        self.slots.take_released()
        self.running.clear()
        self._prefilling.clear()
        self._draining.clear()
        self._leftovers.clear()
        self._stuck = None
        self._committed = next_plan - 1
        self._preparations.reset()
        for sequence in self.waiting.values():
            self._prepare(sequence)
        self.blocks = BlockManager(num_blocks, block_size)

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence. If its output so far ends it, it ends at once."""
        if finish := sequence.ending():
            self._end(sequence, finish)
        else:
            self.waiting[sequence.uid] = sequence
            self._prepare(sequence)

    def prepared(self, message: Prepared) -> None:
        """The worker group has made a matcher, or failed to."""
        sequence = self._preparations.answered(message)
        if sequence is not None and message.failed:
            self._costly(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Removes a sequence. Its blocks are freed when its rows in flight have come back."""
        self.waiting.pop(sequence.uid, None)
        self.running.pop(sequence.uid, None)
        self._draining.pop(sequence.uid, None)
        self._preparations.drop(sequence)
        if sequence.slot != NO_SLOT:
            self._vacate(sequence)

    @property
    def in_hand(self) -> InHand:
        """The requests in hand of the worker group: those in slots, and those whose matchers it
        makes. A request is alone only if no other left its slot with rows in flight, or went while
        its matcher was made."""
        uids = [sequence.uid for sequence in self.slots.sequences if sequence is not None]
        uids += self._preparations.in_hand
        certain = not self._leftovers and not self._preparations.abandoned
        return InHand(uids, alone=len(uids) == 1 and certain)

    # A step -------------------------------------------------------------------------------------

    def plan(self, number: int) -> Step | None:
        """The next step; None if there is nothing to compute now.

        If no plan is in flight either, a plan that computes nothing may release slots.
        """
        slots = self.slots
        draft = Draft(number)
        decode = self._with_room(slots.decoding(), draft)
        budget = self._settings.max_num_batched_tokens - len(decode)
        if len(decode):
            budget = min(budget, self._settings.max_prefill_tokens)
        for sequence in list(self._prefilling.values()):
            if not budget:
                break
            budget -= self._chunk(sequence, budget, draft)
        while budget and (admitted := self._admit(draft)) is not None:
            budget -= self._chunk(admitted, budget, draft)
        idle = not len(decode) and not draft.chunks
        if idle and (not slots.released or self._committed != number - 1):
            return None
        slots.context[decode] += 1
        slots.last_plan[decode] = number
        rows = decode
        if draft.sampling:
            rows = np.concatenate((decode, np.array(draft.sampling, dtype=np.intp)))
        plan = draft.plan(slots.take_released(), decode)
        return Step(plan, rows, slots.epoch[rows], draft.prompts)

    def commit(self, step: Step, token_ids: Ints) -> Sampled:
        """Commits a step: adds its tokens to their sequences. Ends the sequences whose output ends,
        and frees the blocks that only waited for this step.

        Args:
            token_ids: int32 [rows], the result.

        Raises ValueError if there is not one token for each row.
        """
        if len(token_ids) != len(step.rows):
            raise ValueError(
                f"the result of plan {step.plan.number} has {len(token_ids)} rows instead of"
                f" {len(step.rows)}"
            )
        slots = self.slots
        self._committed = step.plan.number
        result_rows = (slots.epoch[step.rows] == step.epochs).nonzero()[0]
        failed = result_rows[token_ids[result_rows] < 0]
        if len(failed):
            for row in failed.tolist():
                self._fail(slots.occupant(int(step.rows[row])), int(token_ids[row]))
            result_rows = result_rows[token_ids[result_rows] >= 0]
        rows = step.rows
        if len(result_rows) < len(rows):
            rows, token_ids = rows[result_rows], token_ids[result_rows]
        known = slots.known[rows]
        sampled = Sampled(
            uids=slots.uid[rows],
            attempts=slots.attempt[rows],
            offsets=known - slots.prompt_tokens[rows],
            token_ids=token_ids,
            detokenizers=slots.detokenizer[rows],
            result_rows=result_rows,
        )
        slots.tokens[rows, known] = token_ids
        slots.known[rows] = known + 1
        for i, reason in slots.ended(rows, token_ids).items():
            sequence = slots.occupant(int(rows[i]))
            self._end(sequence, OutputEnd(reason, int(sampled.offsets[i]) + 1))
        self._free_committed()
        return sampled

    def register_full_blocks(self) -> None:
        """Registers the blocks that have become full, so that other sequences find them."""
        slots = self.slots
        full = np.minimum(slots.known, slots.context) // self.blocks.block_size
        for slot in (full > slots.registered).nonzero()[0].tolist():
            self._register(slots.occupant(slot), int(full[slot]))

    # Decoding -----------------------------------------------------------------------------------

    def _with_room(self, decode: Indices, draft: Draft) -> Indices:
        """The slots of `decode` that have a block for their next token. Appends blocks, and
        preempts sequences if there are not enough blocks."""
        slots = self.slots
        needy = decode[slots.context[decode] % self.blocks.block_size == 0]
        if not len(needy):
            return decode
        left_out: list[int] = []
        for slot in needy[np.argsort(slots.order[needy])].tolist():
            if not slots.decode_limit[slot]:
                continue  # preempted in this loop, for the blocks of an older sequence
            block = self.blocks.append()
            while block is None and self._blocks_to_come() <= len(left_out):
                _, last = self.running.popitem()
                self._preempt(last)
                if not slots.decode_limit[slot]:
                    break  # the preempted sequence was this one
                block = self.blocks.append()
            if block is not None:
                slots.occupant(slot).blocks.append(block)
                draft.append.append((slot, block))
            else:
                left_out.append(slot)
        decode = slots.decoding()
        return np.setdiff1d(decode, left_out) if left_out else decode

    def _preempt(self, sequence: Sequence) -> None:
        """Preempts a sequence. If it has rows in flight, it keeps its slot until they have come
        back, since their tokens may end it."""
        self.preemptions += 1
        slot = sequence.slot
        self._to_the_front(sequence)
        self._prefilling.pop(slot, None)
        self.slots.decode_limit[slot] = 0
        if self.slots.last_plan[slot] > self._committed:
            self._draining[sequence.uid] = sequence
        else:
            self._vacate(sequence)
            self._prepare(sequence)

    def _blocks_to_come(self) -> int:
        """How many blocks results in flight will free, at most."""
        draining = sum(len(sequence.blocks) for sequence in self._draining.values())
        return draining + sum(len(leftover.blocks) for leftover in self._leftovers)

    # Prefill ------------------------------------------------------------------------------------

    def _chunk(self, sequence: Sequence, budget: int, draft: Draft) -> int:
        """Plans the next prefill chunk, of at most `budget` tokens; returns how many it has."""
        slots, slot = self.slots, sequence.slot
        start = int(slots.context[slot])
        rest = int(slots.known[slot]) - start
        length = min(rest, budget)
        draft.chunks.append((slot, start, length))
        if slots.wants_prompt_logprobs[slot]:
            draft.prompts.append(sequence)
        slots.context[slot] += length
        slots.last_plan[slot] = draft.number
        # At once: a step stores all its keys and values before it reads any (in each layer), so
        # that of sequences that come together with one prompt only the first computes its blocks.
        self._register(sequence, (start + length) // self.blocks.block_size)
        if length == rest:
            draft.sampling.append(slot)
            slots.decode_limit[slot] = slots.limit[slot] - 1
            self._prefilling.pop(slot, None)
        else:
            self._prefilling[slot] = sequence
        return length

    def _admit(self, draft: Draft) -> Sequence | None:
        """Admits the first waiting sequence that awaits no matcher, if there are a slot and blocks
        for all its tokens."""
        while self.slots.any_empty:
            sequence = next((s for s in self.waiting.values() if not s.awaits_matcher), None)
            if sequence is None:
                return None
            if sequence.slot != NO_SLOT:
                return None  # preempted, with rows in flight
            limit = self._limit(sequence)
            num_tokens = sequence.prompt_tokens + len(sequence.output) // TOKEN_BYTES
            if 0 < num_tokens < limit:
                return self._take_slot(sequence, num_tokens, limit, draft)
            log.error(
                "request %x cannot run: it has %d tokens, and %d are possible",
                sequence.uid,
                num_tokens,
                limit,
            )
            self._end(sequence, OutputEnd("length", num_tokens - sequence.prompt_tokens))
        return None

    def _limit(self, sequence: Sequence) -> int:
        """How many tokens the sequence may have. The last one is sampled but never computed."""
        capacity = self.blocks.num_blocks * self.blocks.block_size + 1
        asked = sequence.prompt_tokens + sequence.submit.sampling.max_tokens
        return min(asked, self._settings.max_model_len, capacity)

    def _take_slot(
        self, sequence: Sequence, num_tokens: int, limit: int, draft: Draft
    ) -> Sequence | None:
        """Admits a sequence to a slot; None if there are not enough blocks."""
        if self._stuck == (sequence.uid, self.blocks.releases):
            return None
        size = self.blocks.block_size
        tokens = sequence.tokens
        # At least one token must be computed, and its block must be the sequence's own.
        # A position whose log-probabilities are asked for must be computed, too.
        wants_prompt = sequence.wants_prompt_logprobs
        most = 0 if wants_prompt else (num_tokens - 1) // size
        cached, prefix = self.blocks.match(root(sequence.submit.cache_salt), tokens, most)
        reserve = int(self.blocks.num_blocks * RESERVE) if self.running else 0
        blocks = self.blocks.allocate(cached, -(-num_tokens // size) - len(cached), reserve)
        if blocks is None:
            self._stuck = (sequence.uid, self.blocks.releases)
            return None
        del self.waiting[sequence.uid]
        self.running[sequence.uid] = sequence
        sequence.blocks = blocks
        sequence.prefix = prefix
        computed = len(cached) * size
        slot = self.slots.occupy(sequence, unpack(tokens), computed, limit)
        self.slots.registered[slot] = len(cached)
        self.slots.wants_prompt_logprobs[slot] = wants_prompt
        sampling = sequence.submit.sampling
        if not wants_prompt and sampling.prompt_logprobs is not None:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        if sampling.structured_outputs is not None:
            sampling = msgspec.structs.replace(sampling, structured_outputs=None)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(computed, sequence.prompt_tokens)
            self.prompt_tokens += sequence.prompt_tokens
            self.cached_tokens += sequence.cached_tokens
        draft.admit.append(
            Admission(
                slot,
                tokens,
                sequence.prompt_tokens,
                pack(blocks),
                computed,
                sampling,
                self._preparations.admitted(sequence),
            )
        )
        return sequence

    # Leaving ------------------------------------------------------------------------------------

    def _end(self, sequence: Sequence, finish: OutputEnd) -> None:
        self.ended.append(Ended(sequence, self.slots.detokenizer_of(sequence)))
        self.remove(sequence)
        sequence.end(finish)

    def _prepare(self, sequence: Sequence) -> None:
        """Asks for the matcher of a waiting sequence that has no slot, if it has a grammar."""
        if sequence.submit.sampling.structured_outputs is not None:
            self._preparations.begin(sequence)

    def _costly(self, sequence: Sequence) -> None:
        """Its grammar took too much work. What matchers have found out together counts in this
        work: so the sequence waits again, for a matcher that shares nothing; or it ends."""
        if sequence.matcher_alone:
            count = len(self.slots.output(sequence)) // TOKEN_BYTES
            self._end(sequence, OutputEnd("too_costly", count))
            return
        sequence.matcher_alone = True
        if sequence.slot != NO_SLOT:
            self.running.pop(sequence.uid, None)
            self._draining.pop(sequence.uid, None)
            self._vacate(sequence)
            self._to_the_front(sequence)
        self._prepare(sequence)

    def _fail(self, sequence: Sequence, result: int) -> None:
        """There is no next token; `result` stands in its place."""
        count = int(self.slots.known[sequence.slot]) - sequence.prompt_tokens
        if result == TOO_COSTLY:
            self._costly(sequence)
        elif result == NO_TOKEN_LEFT:
            self._end(sequence, OutputEnd("no_token", count))
        else:
            self.failed += 1
            self._end(sequence, OutputEnd("not_finite", count))

    def _vacate(self, sequence: Sequence) -> None:
        """Takes a sequence out of its slot. Its blocks are free once its last row has come back."""
        slots, slot = self.slots, sequence.slot
        full = min(slots.known[slot], slots.context[slot]) // self.blocks.block_size
        self._register(sequence, int(full))
        self._prefilling.pop(slot, None)
        blocks, sequence.blocks = sequence.blocks, []
        until = int(slots.last_plan[slot])
        if until > self._committed:
            self._leftovers.append(Leftover(until, blocks))
        else:
            self.blocks.release(blocks)
        slots.vacate(sequence)

    def _free_committed(self) -> None:
        """Frees the blocks and slots that only waited for rows of the committed plans."""
        if self._leftovers:
            committed = [x for x in self._leftovers if x.until <= self._committed]
            self._leftovers = [x for x in self._leftovers if x.until > self._committed]
            for leftover in committed:
                self.blocks.release(leftover.blocks)
        for sequence in list(self._draining.values()):
            if self.slots.last_plan[sequence.slot] <= self._committed:
                del self._draining[sequence.uid]
                self._vacate(sequence)
                self._prepare(sequence)

    def _register(self, sequence: Sequence, full: int) -> None:
        slots, slot, size = self.slots, sequence.slot, self.blocks.block_size
        for i in range(int(slots.registered[slot]), full):
            tokens = slots.tokens[slot, i * size : (i + 1) * size].tobytes()
            sequence.prefix = self.blocks.register(sequence.blocks[i], sequence.prefix, tokens)
        slots.registered[slot] = full

    def _to_the_front(self, sequence: Sequence) -> None:
        self.waiting[sequence.uid] = sequence
        self.waiting.move_to_end(sequence.uid, last=False)
