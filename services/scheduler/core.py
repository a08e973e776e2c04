"""The scheduler without sockets and clock: messages in, plans and messages out.

On a result call `result`, then `plan`, send `group.unsent`, and only then call `settle`. So the
work that the next plan does not need is done while the device computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from nanovllm.control import SchedulerStats
from nanovllm.messages import (
    NOTHING_IN_HAND,
    End,
    EngineState,
    GroupReady,
    Held,
    IngressToScheduler,
    InHand,
    Lost,
    Missing,
    Prepared,
    RowLogprobs,
    SchedulerToIngress,
    StepPlan,
    StepResult,
    Submit,
    pack,
    pack_int64,
    unpack,
    unpack_int64,
    unpack_list,
)
from nanovllm.services.scheduler.detokenizers import Detokenizers
from nanovllm.services.scheduler.group import WorkerGroup
from nanovllm.services.scheduler.planner import StepPlanner
from nanovllm.services.scheduler.preparations import Preparations
from nanovllm.services.scheduler.sequences import Moments, Sequence
from nanovllm.services.scheduler.steps import Sampled, logprobs_of
from nanovllm.settings import Settings
from nanovllm.transport.links import Peer


class Scheduler:
    """Every request from its `Submit` to its `End`.

    Args:
        engine: the number of this scheduler's engine.
        first_matcher: the number of the first matcher, see `Preparations`.
        clock: tells the time in ns; asked for sequences alone whose timings are wanted.

    Attributes:
        endpoint: where detokenizers connect.
        group: the worker group, and the messages for its rank 0.
        detokenizers: the messages for the detokenizers.
    """

    def __init__(
        self,
        settings: Settings,
        engine: int = 0,
        first_matcher: int = 0,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self.endpoint = settings.scheduler_endpoint(engine)
        self._records: dict[int, Sequence] = {}
        preparations = Preparations(first_matcher)
        self._planner = StepPlanner(settings, preparations)
        self.detokenizers = Detokenizers(self._planner.slots)
        self.group = WorkerGroup(settings.pipeline_depth, preparations)
        # In slots, for the first time and without a token yet: those whose timings are wanted.
        self._without_token: set[int] = set()
        self._unsettled: list[tuple[Sampled, list[RowLogprobs]]] = []
        self._missing: Missing | None = None
        self._lost: list[Lost] = []
        self._told_state: EngineState | None = None
        # Whether a plan or a result may have filled blocks that are not registered yet.
        self._filling = False
        self._latest_plan: StepPlan | None = None
        self._planned = False
        self._steps = 0
        self._generated = 0

    # Requests -----------------------------------------------------------------------------------

    def from_ingress(self, message: IngressToScheduler) -> None:
        if isinstance(message, Submit):
            self.submit(message)
        elif isinstance(message, End):
            self.end(message.uid, message.attempt)
        else:
            self.held(message)

    def submit(self, submit: Submit) -> None:
        """Adds a request. A newer attempt replaces an older one."""
        held = self._records.get(submit.uid)
        if held is not None:
            if submit.attempt <= held.attempt:
                return
            self._drop(held)
        sequence = self._records[submit.uid] = Sequence(submit)
        if submit.timed:
            sequence.moments = Moments(self._clock())
        self._planner.add(sequence)
        if sequence.output and sequence.finish is None:
            # Only a detokenizer can find a stop string in the output.
            self.detokenizers.begin(sequence)
        self._tell_of_ended()

    def end(self, uid: int, attempt: int) -> None:
        """Ends this attempt of the request, and older ones."""
        held = self._records.get(uid)
        if held is not None and held.attempt <= attempt:
            del self._records[uid]
            self._drop(held)

    def held(self, message: Held) -> None:
        """Ends every sequence that the ingress does not expect here. The requests that it expects
        and that are not here will be named in a `Missing`."""
        expected = dict(zip(unpack_int64(message.uids), unpack_list(message.attempts), strict=True))
        for sequence in list(self._records.values()):
            if expected.get(sequence.uid) != sequence.attempt:
                self.end(sequence.uid, sequence.attempt)
        missing = {uid: a for uid, a in expected.items() if uid not in self._records}
        if missing:
            self._missing = Missing(pack_int64(missing), pack(missing.values()))

    def _drop(self, sequence: Sequence) -> None:
        self._planner.remove(sequence)
        self.detokenizers.end(sequence)
        self._without_token.discard(sequence.uid)

    # The ingress --------------------------------------------------------------------------------

    def ingress_up(self) -> None:
        """A connection to the ingress was made. Its first message is `Held`."""
        self._missing = None
        self._told_state = None

    def for_ingress(self) -> list[SchedulerToIngress]:
        """The messages to send to the ingress. Call `ingress_told` once they were sent."""
        messages: list[SchedulerToIngress] = [*self._lost]
        if self._missing is not None:
            messages.append(self._missing)
        if self._told_state != (state := self._state):
            messages.append(state)
        return messages

    def ingress_told(self) -> None:
        self._missing = None
        self._lost.clear()
        self._told_state = self._state

    @property
    def _state(self) -> EngineState:
        blocks = self._planner.blocks
        slots = self._settings.max_num_seqs
        return EngineState(
            self.group.ready, slots, blocks.num_blocks, blocks.block_size, self.endpoint
        )

    # The worker group ---------------------------------------------------------------------------

    def group_ready(self, peer: Peer, message: GroupReady) -> None:
        """The group of rank 0 `peer` waits for a reset. If the group is a new one, all running
        sequences will be computed again."""
        if peer == self.group.peer:
            self.group.announced_again()
            return
        self.group.begin(peer)
        self._planner.reset(message.num_blocks, message.block_size, self.group.next_number)

    def worker_up(self, peer: Peer) -> None:
        """A connection to rank 0 was made."""
        if peer == self.group.peer:
            self._note_lost(peer, NOTHING_IN_HAND)
        self.group.up(peer)

    def worker_down(self, peer: Peer) -> None:
        if peer == self.group.peer:
            self._note_lost(peer, self._planner.in_hand)
        self.group.down(peer)

    def prepared(self, peer: Peer, message: Prepared) -> None:
        if peer == self.group.peer:
            self._planner.prepared(message)
            self._tell_of_ended()

    def result(self, peer: Peer, result: StepResult) -> None:
        """Commits a step: adds its tokens to their sequences, and ends sequences.

        Raises ValueError if the result does not have one token for each row of its plan, or is not
        the next result.
        """
        if peer != self.group.peer or (step := self.group.commit(result)) is None:
            return
        for sequence, part in zip(step.prompts, result.prompt_parts, strict=True):
            sequence.add_prompt_part(part)
        sampled = self._planner.commit(step, unpack(result.token_ids))
        self._steps += 1
        self._generated += len(sampled.token_ids)
        self._unsettled.append((sampled, result.logprobs))
        self._filling = True

    def plan(self) -> bool:
        """Makes the next plan. Returns False if there is nothing to do, or if as many plans are in
        flight as may be."""
        if not self.group.has_room:
            return False
        step = self._planner.plan(self.group.next_number)
        if step is None:
            return False
        self.group.launch(step)
        for admission in step.plan.admit:
            sequence = self._planner.slots.occupant(admission.slot)
            if sequence.moments is not None and sequence.moments.admitted is None:
                sequence.moments.admitted = self._clock()
                self._without_token.add(sequence.uid)
        self._latest_plan = step.plan
        self._planned = True
        self._filling = True
        return True

    def settle(self) -> None:
        """Does what plans and results mean for the detokenizers and the prefix cache."""
        if not (self._unsettled or self._planned or self._planner.ended):
            return
        self._planned = False
        for sampled, logprobs in self._unsettled:
            if self._without_token:
                self._note_first_tokens(sampled)
            if logprobs:
                self._keep(sampled, logprobs)
            self.detokenizers.sampled(sampled, logprobs, self._records.__getitem__)
        self._unsettled.clear()
        self._tell_of_ended()
        if self._filling:
            self._planner.register_full_blocks()
            self._filling = False

    @property
    def failed(self) -> int:
        """How many outputs ended because their logits were not finite."""
        return self._planner.failed

    # Detokenizers -------------------------------------------------------------------------------

    def detokenizer_up(self, peer: Peer) -> None:
        self._note_lost(peer, NOTHING_IN_HAND)
        self.detokenizers.up(peer)

    def detokenizer_down(self, peer: Peer) -> None:
        self._note_lost(peer, self.detokenizers.in_hand(peer))
        self.detokenizers.down(peer)

    # ----------------------------------------------------------------------------------------------

    def stats(self) -> SchedulerStats:
        planner, plan = self._planner, self._latest_plan
        return SchedulerStats(
            running=len(planner.running),
            waiting=len(planner.waiting),
            records=len(self._records),
            blocks_used=planner.blocks.num_used,
            blocks_total=planner.blocks.num_blocks,
            prompt_tokens=planner.prompt_tokens,
            cached_tokens=planner.cached_tokens,
            steps=self._steps,
            generated=self._generated,
            preemptions=planner.preemptions,
            plan_bytes=0 if plan is None else len(msgspec.msgpack.encode(plan)),
        )

    def _note_lost(self, peer: Peer, in_hand: InHand) -> None:
        """Notes for the ingress which requests a lost service had in hand."""
        self._lost.append(Lost(peer.service, peer.incarnation, in_hand))

    def _note_first_tokens(self, sampled: Sampled) -> None:
        """A detokenizer may have begun them before, with the output of earlier attempts."""
        for uid in self._without_token.intersection(sampled.uids.tolist()):
            self._without_token.discard(uid)
            sequence = self._records[uid]
            if sequence.moments is not None:
                sequence.moments.first_token = self._clock()
            self.detokenizers.begin(sequence)

    def _tell_of_ended(self) -> None:
        for ended in self._planner.ended:
            if (moments := ended.sequence.moments) is not None:
                moments.ended = self._clock()
            self.detokenizers.finish(ended)
        self._planner.ended.clear()

    def _keep(self, sampled: Sampled, logprobs: list[RowLogprobs]) -> None:
        """Keeps logprobs with their sequences, since a `Begin` repeats them."""
        for i, entry in logprobs_of(sampled.result_rows, logprobs):
            self._records[int(sampled.uids[i])].logprobs.append(entry)
