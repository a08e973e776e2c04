"""The scheduler without sockets and clock: messages in, plans and messages out.

On a result call `result`, then `plan`, send what is `for_worker`, and only then `settle`: what the
next plan does not need is done while the device works.
"""

from __future__ import annotations

import msgspec
import numpy as np

from nanovllm.control import SchedulerStats
from nanovllm.messages import (
    Admitted,
    EngineState,
    GroupReady,
    Lost,
    RowLogprobs,
    SchedulerToIngress,
    SchedulerToWorker,
    StepPlan,
    StepResult,
    Submit,
    uid_epoch,
    unpack,
)
from nanovllm.services.scheduler.engine import Engine
from nanovllm.services.scheduler.group import WorkerGroup
from nanovllm.services.scheduler.routing import Parcel, Router
from nanovllm.services.scheduler.sequences import InHand, Sequence
from nanovllm.services.scheduler.steps import Sampled
from nanovllm.settings import Settings
from nanovllm.transport.links import Peer


class Scheduler:
    """Every request from its `Submit` to its `End`."""

    def __init__(self, settings: Settings) -> None:
        self._records: dict[int, Sequence] = {}
        self._engine = Engine(settings)
        self._router = Router(self._engine.slots)
        self._group = WorkerGroup(settings.pipeline_depth)
        self._unsettled: list[tuple[Sampled, list[RowLogprobs]]] = []
        self._ingress: int | None = None
        self._dead_epochs: set[int] = set()
        self._admitted: dict[int, Admitted] = {}
        self._lost: list[Lost] = []
        self._told_ready: bool | None = None
        # Whether a plan or a result may have filled blocks since the last look.
        self._filling = False
        self._latest_plan: StepPlan | None = None
        self._planned = False
        self._steps = 0
        self._generated = 0

    # Requests -----------------------------------------------------------------------------------

    def submit(self, submit: Submit) -> None:
        """A request in token ids, or a copy of one; a newer attempt replaces an older one."""
        uid = submit.uid
        if uid_epoch(uid) in self._dead_epochs:
            return
        held = self._records.get(uid)
        if held is not None and submit.attempt < held.attempt:
            return
        self._admitted[uid] = Admitted(uid, submit.attempt)
        if held is not None:
            if submit.attempt == held.attempt:
                return
            self._drop(held)
        sequence = self._records[uid] = Sequence(submit)
        self._engine.add(sequence)
        if sequence.output and sequence.finish is None:
            # A stop string may be in it, which only a detokenizer can find.
            self._router.owe(sequence)
        self._tell_of_ended()

    def end(self, uid: int) -> None:
        """Nobody needs this request any more, wherever it is."""
        sequence = self._records.pop(uid, None)
        self._admitted.pop(uid, None)
        if sequence is not None:
            self._drop(sequence)

    def recall(self, uid: int, attempt: int) -> None:
        """This attempt, and older ones, are not to be run."""
        held = self._records.get(uid)
        if held is not None and held.attempt <= attempt:
            self.end(uid)

    def _drop(self, sequence: Sequence) -> None:
        self._engine.remove(sequence)
        self._router.forget(sequence.uid)

    # The ingress --------------------------------------------------------------------------------

    def ingress_up(self, incarnation: int) -> None:
        """The ingress is there, in this life. It hears of all that is held of its own; the
        requests of its earlier lives are nobody's."""
        stale = [uid for uid in self._records if uid_epoch(uid) != incarnation]
        self._dead_epochs.update(uid_epoch(uid) for uid in stale)
        if self._ingress not in (None, incarnation):
            self._dead_epochs.add(self._ingress)
        self._ingress = incarnation
        for uid in stale:
            self.end(uid)
        self._admitted = {
            uid: Admitted(uid, sequence.attempt) for uid, sequence in self._records.items()
        }
        self._lost.clear()
        self._told_ready = None

    def for_ingress(self) -> list[SchedulerToIngress]:
        """What the ingress is to be told; call `ingress_told` once it was."""
        messages: list[SchedulerToIngress] = [*self._admitted.values(), *self._lost]
        if self._told_ready is not self._group.ready:
            messages.append(EngineState(self._group.ready))
        return messages

    def ingress_told(self) -> None:
        self._admitted.clear()
        self._lost.clear()
        self._told_ready = self._group.ready

    # The worker group ---------------------------------------------------------------------------

    def group_ready(self, peer: Peer, message: GroupReady) -> None:
        """Rank 0 `peer` waits for a reset. In a new life: whoever ran is to be recomputed."""
        if peer == self._group.peer:
            self._group.announced_again()
            return
        self._group.begin(peer)
        self._engine.reset(message.num_blocks, message.block_size, self._group.next_number)

    def worker_up(self, peer: Peer) -> None:
        """A connection to rank 0 was made."""
        if peer == self._group.peer:
            self._note_lost(peer, InHand([], others=False))
        self._group.up(peer)

    def worker_down(self, peer: Peer) -> None:
        if peer == self._group.peer:
            self._note_lost(peer, self._engine.in_hand)
        self._group.down(peer)

    def result(self, peer: Peer, result: StepResult) -> None:
        """What a step sampled: finds who ended, and frees what that frees.

        Raises ValueError if it is not what the plan asked for.
        """
        if peer != self._group.peer or (step := self._group.land(result)) is None:
            return
        sampled = self._engine.land(step, unpack(result.token_ids))
        self._steps += 1
        self._generated += len(sampled.token_ids)
        self._unsettled.append((sampled, result.logprobs))
        self._filling = True

    def plan(self) -> bool:
        """Makes the next plan, if one may be in flight and there is something to do."""
        if not self._group.has_room:
            return False
        step = self._engine.plan(self._group.next_number)
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
        if not (self._unsettled or self._planned or self._engine.ended):
            return
        self._planned = False
        for sampled, logprobs in self._unsettled:
            if logprobs:
                self._keep(sampled, logprobs)
            self._router.sampled(sampled, logprobs, self._records.__getitem__)
        self._unsettled.clear()
        self._tell_of_ended()
        if self._filling:
            self._engine.register_full_blocks()
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
        self._note_lost(peer, InHand([], others=False))
        self._router.up(peer)

    def detokenizer_down(self, peer: Peer) -> None:
        self._note_lost(peer, self._router.in_hand(peer))
        self._router.down(peer)

    def parcels(self) -> list[Parcel]:
        """A frame for each detokenizer that has something to hear. Tell at once what became of
        it, by `delivered` or `undelivered`; in the latter case there are more after `retry`."""
        return self._router.parcels()

    def delivered(self, parcel: Parcel) -> None:
        self._router.delivered(parcel)

    def undelivered(self, parcel: Parcel) -> None:
        self._router.undelivered(parcel)

    def retry(self) -> None:
        """Time has passed: who did not keep up may be told again."""
        self._router.retry()

    @property
    def blocked(self) -> bool:
        """Whether a detokenizer does not keep up."""
        return self._router.blocked

    # ----------------------------------------------------------------------------------------------

    def stats(self) -> SchedulerStats:
        engine, plan = self._engine, self._latest_plan
        return SchedulerStats(
            running=len(engine.running),
            waiting=len(engine.waiting),
            records=len(self._records),
            blocks_used=engine.blocks.num_used,
            blocks_total=engine.blocks.num_blocks,
            prompt_tokens=engine.prompt_tokens,
            cached_tokens=engine.cached_tokens,
            steps=self._steps,
            generated=self._generated,
            preemptions=engine.preemptions,
            plan_bytes=0 if plan is None else len(msgspec.msgpack.encode(plan)),
        )

    def _note_lost(self, peer: Peer, in_hand: InHand) -> None:
        """The ingress is to hear who was in hand when the link to a service was lost."""
        uids = np.array(in_hand.uids, dtype="<i8").tobytes()
        self._lost.append(Lost(peer.role, peer.index, peer.incarnation, uids, in_hand.others))

    def _tell_of_ended(self) -> None:
        for ended in self._engine.ended:
            self._router.ended(ended)
        self._engine.ended.clear()

    def _keep(self, sampled: Sampled, logprobs: list[RowLogprobs]) -> None:
        """Logprobs are kept with their sequence: a `Begin` repeats them."""
        uid_of = dict(zip(sampled.result_rows.tolist(), sampled.uids.tolist(), strict=True))
        for entry in logprobs:
            if entry.row in uid_of:
                self._records[uid_of[entry.row]].logprobs.append(entry.logprobs)
