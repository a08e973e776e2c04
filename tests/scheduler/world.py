"""The scheduler's core among its fakes, driven as its loop drives it and checked at every step."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from nanovllm.messages import (
    EngineState,
    Held,
    Lost,
    Missing,
    StepPlan,
    Submit,
    pack,
    pack_int64,
    unpack,
    unpack_int64,
)
from nanovllm.protocol import Sampling
from nanovllm.services.scheduler.core import Scheduler
from nanovllm.services.scheduler.planner import StepPlanner
from nanovllm.settings import Settings
from nanovllm.transport.links import Peer
from tests.scheduler.fakes import (
    VOCABULARY,
    FakeDetokenizer,
    FakeWorker,
    Request,
    next_state,
    root_state,
)


class World:
    """A scheduler with one ingress, one worker group and some detokenizers.

    Attributes:
        requests: by (uid, attempt), all that were ever submitted.
        live: what the scheduler should have, by uid.
        missing, states, lost: what the ingress was told.
    """

    def __init__(
        self,
        *,
        depth: int = 2,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_prefill_tokens: int = 32,
        max_model_len: int = 64,
        detokenizers: int = 1,
        start: bool = True,
    ) -> None:
        self.settings = Settings(
            pipeline_depth=depth,
            kvcache_block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_prefill_tokens=max_prefill_tokens,
            max_model_len=max_model_len,
        )
        self.now_ns = 0
        self.core = Scheduler(self.settings, clock=lambda: self.now_ns)
        self.requests: dict[tuple[int, int], Request] = {}
        self.by_seed: dict[int | None, Request] = {}
        self.live: dict[int, Request] = {}
        self.missing: list[dict[int, int]] = []
        self.states: list[EngineState] = []
        self.lost: list[Lost] = []
        self.detokenizers: dict[Peer, FakeDetokenizer] = {}
        self.deaf: set[Peer] = set()
        self._incarnations = 100
        self._counter = 0
        self._num_detokenizers = detokenizers
        self.worker_peer = Peer("gpu_worker", 0, self._incarnation())
        self.worker = self._new_worker(num_blocks)
        self.worker_connected = False
        self.ingress_up({})
        if start:
            for index in range(detokenizers):
                self.detokenizer_up(index)
            self.start_worker()

    @property
    def planner(self) -> StepPlanner:
        return self.core._planner

    # What clients do ----------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int = 8,
        output: Sequence[int] = (),
        stop_ids: Sequence[int] = (),
        salt: str = "",
        logprobs: int | None = None,
    ) -> Request:
        self._counter += 1
        room = self.settings.max_model_len - len(prompt)
        sampling = Sampling(
            max_tokens=min(max_tokens, room),
            stop_token_ids=list(stop_ids),
            seed=self._counter,
            logprobs=logprobs,
        )
        return self.submit_raw(
            Submit(
                uid=self._counter,
                attempt=0,
                prompt=pack(prompt),
                output=pack(output),
                resumed=len(output),
                sampling=sampling,
                cache_salt=salt,
            )
        )

    def submit_again(self, request: Request, attempt: int, output: Sequence[int]) -> Request:
        """A later attempt, with the output so far."""
        return self.submit_raw(
            msgspec.structs.replace(request.submit, attempt=attempt, output=pack(output))
        )

    def submit_raw(self, submit: Submit) -> Request:
        there = self.live.get(submit.uid)
        request = Request(submit, len(self.requests))
        if there is None or submit.attempt > there.submit.attempt:
            self.requests[submit.uid, submit.attempt] = request
            self.by_seed[submit.sampling.seed] = request
            self.live[submit.uid] = request
        self.core.submit(submit)
        return request

    def end(self, request: Request, attempt: int | None = None) -> None:
        """Ends this attempt (or that one), and older ones."""
        uid = request.submit.uid
        attempt = request.submit.attempt if attempt is None else attempt
        if uid in self.live and self.live[uid].submit.attempt <= attempt:
            del self.live[uid]
        self.core.end(uid, attempt)

    def tokens_of(self, request: Request) -> list[int]:
        """What the detokenizers have of this attempt."""
        found = [d.outputs.get(request.submit.uid) for d in self.detokenizers.values()]
        of_attempt = [d for d in found if d is not None and d.attempt == request.submit.attempt]
        return max((d.tokens for d in of_attempt), key=len, default=[])

    def is_finished(self, request: Request) -> bool:
        found = [d.outputs.get(request.submit.uid) for d in self.detokenizers.values()]
        return any(
            d is not None and d.attempt == request.submit.attempt and d.finished is not None
            for d in found
        )

    # What goes wrong ----------------------------------------------------------------------------

    def ingress_up(self, held: Mapping[int, int]) -> None:
        """A connection to the ingress is made, which names these attempts, by uid."""
        self.core.ingress_up()
        self.core.held(Held(pack_int64(held), pack(held.values())))
        self.live = {
            uid: request
            for uid, request in self.live.items()
            if held.get(uid) == request.submit.attempt
        }

    def detokenizer_up(self, index: int) -> Peer:
        """A detokenizer starts."""
        for peer in [p for p in self.detokenizers if p.index == index]:
            self.detokenizer_down(peer)
        peer = Peer("detokenizer", index, self._incarnation())
        self.detokenizers[peer] = FakeDetokenizer(self.requests)
        self.core.detokenizer_up(peer)
        return peer

    def detokenizer_down(self, peer: Peer) -> FakeDetokenizer:
        """The link is lost; it may come back by `detokenizer_back`."""
        self.core.detokenizer_down(peer)
        return self.detokenizers.pop(peer)

    def detokenizer_back(self, peer: Peer, detokenizer: FakeDetokenizer) -> None:
        detokenizer.scheduler_up()
        self.detokenizers[peer] = detokenizer
        self.core.detokenizer_up(peer)

    def start_worker(self) -> None:
        self.worker_connected = True
        self.core.worker_up(self.worker_peer)
        self.core.group_ready(self.worker_peer, self.worker.announcement())
        self.pump()

    def restart_worker(self, num_blocks: int) -> None:
        self.core.worker_down(self.worker_peer)
        self.worker_peer = Peer("gpu_worker", 0, self._incarnation())
        self.worker = self._new_worker(num_blocks)
        self.start_worker()

    def reconnect_worker(self) -> None:
        self.core.worker_down(self.worker_peer)
        self.worker.disconnect()
        self.core.worker_up(self.worker_peer)
        self.worker.reconnect()
        if self.worker.waits_for_reset:
            self.core.group_ready(self.worker_peer, self.worker.announcement())

    # The loop -----------------------------------------------------------------------------------

    def pump(self) -> None:
        """What the loop does after each wake-up."""
        self._launch()
        self.tell_ingress()
        while frames := self.core.detokenizers.frames():
            for frame in frames:
                if frame.peer in self.deaf:
                    self.core.detokenizers.undelivered(frame)
                else:
                    self.detokenizers[frame.peer].take(frame.messages)
                    self.core.detokenizers.delivered(frame)
        self.check()

    def tell_ingress(self) -> None:
        for message in self.core.for_ingress():
            if isinstance(message, Missing):
                uids, attempts = unpack_int64(message.uids), unpack(message.attempts).tolist()
                self.missing.append(dict(zip(uids, attempts, strict=True)))
            elif isinstance(message, EngineState):
                self.states.append(message)
            else:
                self.lost.append(message)
        self.core.ingress_told()
        assert not self.core.for_ingress()

    def work(self) -> None:
        """The worker runs all plans that it has."""
        while self.worker.inbox:
            self.worker.work()

    def result(self) -> bool:
        """The oldest result arrives; False if there is none."""
        self.work()
        if not self.worker.outbox:
            return False
        result = self.worker.outbox.popleft()
        self.worker.heard(result)
        self.core.result(self.worker_peer, result)
        self._launch()
        return True

    def step(self) -> bool:
        """A result arrives, and what follows from it; False if there is none."""
        arrived = self.result()
        self.core.detokenizers.retry()
        self.pump()
        return arrived

    def run(self, most_steps: int = 5000) -> None:
        """Until nothing is in flight any more."""
        self.pump()
        for _ in range(most_steps):
            if not self.step():
                return
        raise AssertionError("it does not end")

    def _launch(self) -> None:
        planned = True
        while planned:
            planned = self.core.plan()
            messages = self.core.group.unsent
            self.worker.inbox.extend(messages)
            self.core.group.sent()
            if planned and messages and isinstance(messages[-1], StepPlan):
                self._check_order(messages[-1])
            self.core.settle()

    # Checks -------------------------------------------------------------------------------------

    def _check_order(self, plan: StepPlan) -> None:
        """First come, first served: no sequence waits that came before one that was admitted."""
        for admission in plan.admit:
            request = self.by_seed[admission.sampling.seed]
            for uid in self.planner.waiting:
                assert self.live[uid].arrival > request.arrival, "overtaken"

    def check(self) -> None:
        """Every block is accounted for."""
        planner, blocks = self.planner, self.planner.blocks
        holders: Counter[int] = Counter()
        for sequence in planner.slots.sequences:
            if sequence is not None:
                assert len(set(sequence.blocks)) == len(sequence.blocks)
                holders.update(sequence.blocks)
        for leftover in planner._leftovers:
            holders.update(leftover.blocks)
        for block in range(blocks.num_blocks):
            assert blocks._references[block] == holders[block], f"block {block}"
            assert (block in blocks._free) == (holders[block] == 0)
        self._check_names()
        assert len(planner.running) + len(planner._draining) <= self.settings.max_num_seqs
        attempts = {uid: sequence.attempt for uid, sequence in self.core._records.items()}
        assert attempts == {uid: request.submit.attempt for uid, request in self.live.items()}

    def _check_names(self) -> None:
        """What a block is said to hold is what the worker has written there."""
        blocks = self.planner.blocks
        named = {}
        for name, block in blocks._named.items():
            contents = blocks._contents[block]
            assert contents is not None
            assert contents.prefix.name == name
            named[contents.prefix.identity] = (block, contents)
        if not self.worker.is_at(self.core.group.next_number):
            return  # written once all plans have run
        states: dict[int | str, int] = {}
        for identity, (block, contents) in sorted(named.items()):
            state = states.get(contents.parent)
            if isinstance(contents.parent, str):
                state = root_state(contents.parent)
            if state is None:
                continue  # its predecessor is gone, and it cannot be found
            for offset, token in enumerate(unpack(contents.tokens).tolist()):
                state = next_state(state, token)
                assert self.worker.kv(block, offset) == state, "not what its name says"
            states[identity] = state

    def check_all_delivered(self) -> None:
        for request in self.live.values():
            assert self.is_finished(request), f"{request} is at {self.tokens_of(request)}"
            assert self.tokens_of(request) == request.expected

    def check_nothing_left(self) -> None:
        """All requests are ended, and nothing is left of them anywhere."""
        for request in list(self.live.values()):
            self.end(request)
        self.run()
        stats = self.core.stats()
        assert (stats.running, stats.waiting, stats.records, stats.blocks_used) == (0, 0, 0, 0)
        assert not self.worker.slots
        assert not self.planner._leftovers
        assert all(not detokenizer.outputs for detokenizer in self.detokenizers.values())
        assert not self.core.detokenizers._of
        assert not self.core.detokenizers._unassigned

    def _incarnation(self) -> int:
        self._incarnations += 1
        return self._incarnations

    def _new_worker(self, num_blocks: int) -> FakeWorker:
        settings = self.settings
        return FakeWorker(
            num_blocks,
            settings.kvcache_block_size,
            self.by_seed,
            depth=settings.pipeline_depth,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_prefill_tokens=settings.max_prefill_tokens,
        )


def random_prompt(draw: random.Random, longest: int) -> list[int]:
    """A beginning that others may have too, and then something of its own."""
    pattern = draw.choice([[5, 6, 7, 8], [5, 6, 7, 8], [9]])
    shared = (pattern * longest)[: draw.randrange(longest - 2)]
    return shared + [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 4))]
