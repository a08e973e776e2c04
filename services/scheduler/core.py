"""The scheduler without sockets and clock: messages in, plans and messages out.

On a result call `result`, then `plan`, send what is `for_worker`, and only then `settle`: what the
next plan does not need is done while the device works.
"""

from __future__ import annotations

import msgspec

from nanovllm.control import SchedulerStats
from nanovllm.messages import (
    NOTHING_IN_HAND,
    EngineState,
    GroupReady,
    Held,
    InHand,
    Lost,
    Missing,
    RowLogprobs,
    SchedulerToIngress,
    SchedulerToWorker,
    StepPlan,
    StepResult,
    Submit,
    pack,
    pack_int64,
    unpack,
    unpack_int64,
)
from nanovllm.services.scheduler.detokenizers import DetokenizerFrame, Detokenizers
from nanovllm.services.scheduler.group import WorkerGroup
from nanovllm.services.scheduler.planner import StepPlanner
from nanovllm.services.scheduler.sequences import Sequence
from nanovllm.services.scheduler.steps import Sampled
from nanovllm.settings import Settings
from nanovllm.transport.links import Peer


class Scheduler:
    """Every request from its `Submit` to its `End`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._records: dict[int, Sequence] = {}
        self._planner = StepPlanner(settings)
        self._detokenizers = Detokenizers(self._planner.slots)
        self._group = WorkerGroup(settings.pipeline_depth)
        self._unsettled: list[tuple[Sampled, list[RowLogprobs]]] = []
        self._missing: Missing | None = None
        self._lost: list[Lost] = []
        self._told_state: EngineState | None = None
        # Whether a plan or a result may have filled blocks since the last look.
        self._filling = False
        self._latest_plan: StepPlan | None = None
        self._planned = False
        self._steps = 0
        self._generated = 0

    # Requests -----------------------------------------------------------------------------------

    def submit(self, submit: Submit) -> None:
        """A request in token ids; a newer attempt replaces an older one."""
        held = self._records.get(submit.uid)
        if held is not None:
            if submit.attempt <= held.attempt:
                return
            self._drop(held)
        sequence = self._records[submit.uid] = Sequence(submit)
        self._planner.add(sequence)
        if sequence.output and sequence.finish is None:
            # A stop string may be in it, which only a detokenizer can find.
            self._detokenizers.begin(sequence)
        self._tell_of_ended()

    def end(self, uid: int, attempt: int) -> None:
        """This attempt, and older ones, are not to be run any more."""
        held = self._records.get(uid)
        if held is not None and held.attempt <= attempt:
            del self._records[uid]
            self._drop(held)

    def held(self, message: Held) -> None:
        """What the ingress believes to be here: all else ends, and it hears what is not."""
        expected = dict(
            zip(unpack_int64(message.uids), unpack(message.attempts).tolist(), strict=True)
        )
        for sequence in list(self._records.values()):
            if expected.get(sequence.uid) != sequence.attempt:
                self.end(sequence.uid, sequence.attempt)
        missing = {uid: a for uid, a in expected.items() if uid not in self._records}
        if missing:
            self._missing = Missing(pack_int64(missing), pack(missing.values()))

    def _drop(self, sequence: Sequence) -> None:
        self._planner.remove(sequence)
        self._detokenizers.end(sequence)

    # The ingress --------------------------------------------------------------------------------

    def ingress_up(self) -> None:
        """A connection to the ingress was made. Its first message is `Held`."""
        self._missing = None
        self._told_state = None

    def for_ingress(self) -> list[SchedulerToIngress]:
        """What the ingress is to be told; call `ingress_told` once it was."""
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
        return EngineState(self._group.ready, slots, blocks.num_blocks, blocks.block_size)

    # The worker group ---------------------------------------------------------------------------

    def group_ready(self, peer: Peer, message: GroupReady) -> None:
        """Rank 0 `peer` waits for a reset. In a new incarnation: all that ran is to be computed
        again."""
        if peer == self._group.peer:
            self._group.announced_again()
            return
        self._group.begin(peer)
        self._planner.reset(message.num_blocks, message.block_size, self._group.next_number)

    def worker_up(self, peer: Peer) -> None:
        """A connection to rank 0 was made."""
        if peer == self._group.peer:
            self._note_lost(peer, NOTHING_IN_HAND)
        self._group.up(peer)

    def worker_down(self, peer: Peer) -> None:
        if peer == self._group.peer:
            self._note_lost(peer, self._planner.in_hand)
        self._group.down(peer)

    def result(self, peer: Peer, result: StepResult) -> None:
        """What a step sampled: finds the sequences that ended, and frees what that frees.

        Raises ValueError if it is not what the plan asked for.
        """
        if peer != self._group.peer or (step := self._group.commit(result)) is None:
            return
        sampled = self._planner.commit(step, unpack(result.token_ids))
        self._steps += 1
        self._generated += len(sampled.token_ids)
        self._unsettled.append((sampled, result.logprobs))
        self._filling = True

    def plan(self) -> bool:
        """Makes the next plan, if one may be in flight and there is something to do."""
        if not self._group.has_room:
            return False
        step = self._planner.plan(self._group.next_number)
        if step is None:
            return False
        self._group.launch(step)
        self._latest_plan = step.plan
        self._planned = True
        self._filling = True
        return True

    def settle(self) -> None:
        """What a plan or a result means for others than the device: the detokenizers and the
        prefix cache."""
        if not (self._unsettled or self._planned or self._planner.ended):
            return
        self._planned = False
        for sampled, logprobs in self._unsettled:
            if logprobs:
                self._keep(sampled, logprobs)
            self._detokenizers.sampled(sampled, logprobs, self._records.__getitem__)
        self._unsettled.clear()
        self._tell_of_ended()
        if self._filling:
            self._planner.register_full_blocks()
            self._filling = False

    def for_worker(self) -> list[SchedulerToWorker]:
        """What rank 0 is to be told, in order; call `worker_told` once it was."""
        return self._group.unsent

    def worker_told(self) -> None:
        self._group.sent()

    @property
    def worker(self) -> Peer | None:
        return self._group.peer

    # Detokenizers -------------------------------------------------------------------------------

    def detokenizer_up(self, peer: Peer) -> None:
        self._note_lost(peer, NOTHING_IN_HAND)
        self._detokenizers.up(peer)

    def detokenizer_down(self, peer: Peer) -> None:
        self._note_lost(peer, self._detokenizers.in_hand(peer))
        self._detokenizers.down(peer)

    def for_detokenizers(self) -> list[DetokenizerFrame]:
        """A frame for each detokenizer that is to be told something. Tell at once what became of
        each, by `delivered` or `undelivered`; in the latter case there are more after `retry`."""
        return self._detokenizers.frames()

    def delivered(self, frame: DetokenizerFrame) -> None:
        self._detokenizers.delivered(frame)

    def undelivered(self, frame: DetokenizerFrame) -> None:
        self._detokenizers.undelivered(frame)

    def retry(self) -> None:
        """Time has passed: detokenizers that did not keep up may be told again."""
        self._detokenizers.retry()

    @property
    def blocked(self) -> bool:
        """Whether a detokenizer does not keep up."""
        return self._detokenizers.blocked

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
        """The ingress is to hear what was in hand when the link to a service was lost."""
        self._lost.append(Lost(peer.role, peer.index, peer.incarnation, in_hand))

    def _tell_of_ended(self) -> None:
        for ended in self._planner.ended:
            self._detokenizers.finish(ended)
        self._planner.ended.clear()

    def _keep(self, sampled: Sampled, logprobs: list[RowLogprobs]) -> None:
        """Logprobs are kept with their sequence: a `Begin` repeats them."""
        uid_of = dict(zip(sampled.result_rows.tolist(), sampled.uids.tolist(), strict=True))
        for entry in logprobs:
            if entry.row in uid_of:
                self._records[uid_of[entry.row]].logprobs.append(entry.logprobs)
