"""Property: after any events in any order, blocks add up, tokens reach their sequence, all ends."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from nanovllm.services.scheduler import blocks
from nanovllm.transport.links import Peer
from tests.scheduler.fakes import FakeDetokenizer, Request
from tests.scheduler.world import World, random_prompt

# The seed of a random walk does not shrink.
EXAMPLES = settings(
    max_examples=120,
    derandomize=True,
    phases=[Phase.generate],
)


class Chaos:
    """Random events, among which the steps of the worker are the most frequent."""

    def __init__(self, world: World, draw: random.Random, troubles: bool) -> None:
        self.world = world
        self.draw = draw
        self.gone: list[tuple[Peer, FakeDetokenizer]] = []
        self.events: list[tuple[Callable[[], None], float]] = [
            (self.submit, 6),
            (self.step, 12),
            (self.late_step, 4),
            (self.result, 4),
            (self.end, 2),
        ]
        if troubles:
            self.events += [
                (self.copy, 1),
                (self.new_attempt, 1),
                (self.detokenizer_dies, 1),
                (self.detokenizer_leaves, 1),
                (self.detokenizer_returns, 2),
                (self.congestion, 1),
                (self.worker_reconnects, 1),
                (self.worker_restarts, 0.3),
                (self.ingress_reborn, 0.2),
                (self.ingress_reconnects, 0.7),
            ]

    def run(self, steps: int) -> None:
        weights = [weight for _, weight in self.events]
        for event, _ in self.draw.choices(self.events, weights, k=steps):
            event()
            self.world.check()
        for peer, detokenizer in self.gone:
            self.world.detokenizer_back(peer, detokenizer)
        self.gone.clear()
        if not self.world.detokenizers:
            self.world.detokenizer_up(0)
        self.world.deaf.clear()
        self.world.run()
        self.world.check_all_delivered()
        self.world.check_nothing_left()

    def submit(self) -> None:
        draw, longest = self.draw, self.world.settings.max_model_len
        prompt = random_prompt(draw, longest - 1)
        resumed = draw.choice([0] * 6 + [2, 5])
        self.world.submit(
            prompt,
            max_tokens=draw.choice([1, 2, 5, 12, 30]),
            output=[draw.randrange(50) for _ in range(min(resumed, longest - 1 - len(prompt)))],
            stop_ids=draw.sample(range(50), draw.choice([0, 1, 3, 12])),
            salt=draw.choice(["", "", "pepper"]),
            logprobs=draw.choice([None, None, 0]),
        )
        self._pump_perhaps()

    def step(self) -> None:
        self.world.worker.step_us = self.draw.choice((0, 500, 900))
        self.world.step()

    def late_step(self) -> None:
        """The worker is ahead of what the scheduler hears."""
        self.world.work()
        self.world.pump()

    def result(self) -> None:
        """Only the worker is told at once what follows."""
        self.world.result()

    def end(self) -> None:
        if request := self._any():
            self.world.end(request, request.submit.attempt + self.draw.choice([-1, 0, 0, 0, 1]))
        self.world.core.end(987654321, 0)

    def copy(self) -> None:
        if request := self._any():
            self.world.submit_raw(request.submit)

    def new_attempt(self) -> None:
        """Also after an `End`, as when the request is to run elsewhere or later."""
        if request := self._any():
            if self.draw.random() < 0.5:
                self.world.end(request)
                self._pump_perhaps()
            self._submit_again(request, request.submit.attempt + 1)
            self.world.submit_raw(request.submit)  # an older one: it changes nothing
            self.world.end(request)

    def detokenizer_dies(self) -> None:
        self.world.detokenizer_up(self.draw.randrange(self.world._num_detokenizers))
        self.gone = [x for x in self.gone if x[0].index not in self._indices()]

    def detokenizer_leaves(self) -> None:
        if self.world.detokenizers:
            for _ in range(self.draw.randrange(3)):
                self.world.result()
            peer = self.draw.choice(list(self.world.detokenizers))
            self.gone.append((peer, self.world.detokenizer_down(peer)))

    def detokenizer_returns(self) -> None:
        if self.gone:
            self.world.detokenizer_back(*self.gone.pop())

    def congestion(self) -> None:
        peers = list(self.world.detokenizers)
        self.world.deaf = set(self.draw.sample(peers, self.draw.randrange(len(peers) + 1)))

    def worker_reconnects(self) -> None:
        self.world.reconnect_worker()

    def worker_restarts(self) -> None:
        limits = self.world.settings
        enough = -(-limits.max_model_len // limits.kvcache_block_size)
        self.world.restart_worker(enough + self.draw.choice([0, 3, 30]))

    def ingress_reborn(self) -> None:
        self.world.ingress_up({})
        self._pump_perhaps()

    def ingress_reconnects(self) -> None:
        """`Held` does not name all that is here, and names what is not: that is submitted again."""
        world, draw = self.world, self.draw
        before = dict(world.live)
        kept = [uid for uid in before if draw.random() < 0.8]
        lost = [uid for uid in before if draw.random() < 0.2]  # their latest attempt never came
        missing = {uid: before[uid].submit.attempt + 1 for uid in lost}
        missing.update({10**9: 5} if draw.random() < 0.3 else {})
        world.missing.clear()
        world.ingress_up({uid: before[uid].submit.attempt for uid in kept} | missing)
        assert set(world.live) == set(kept) - set(lost)
        world.tell_ingress()
        assert world.missing == ([missing] if missing else [])
        self._pump_perhaps()
        for uid in lost:
            self._submit_again(before[uid], missing[uid] + 1)

    def _submit_again(self, request: Request, attempt: int) -> None:
        resumed = request.submit.resumed
        longest = self.draw.randint(resumed, max(resumed, len(request.expected)))
        self.world.submit_again(request, attempt, request.expected[:longest])

    def _pump_perhaps(self) -> None:
        if self.draw.random() < 0.5:
            self.world.pump()

    def _any(self) -> Request | None:
        return self.draw.choice(list(self.world.live.values())) if self.world.live else None

    def _indices(self) -> set[int]:
        return {peer.index for peer in self.world.detokenizers}


@EXAMPLES
@given(
    seed=st.integers(0, 2**32),
    depth=st.integers(1, 8),
    block_size=st.sampled_from([1, 3, 4, 16]),
    max_num_seqs=st.sampled_from([1, 3, 8]),
    budgets=st.sampled_from([(8, 3), (16, 16), (64, 20)]),
    spare_blocks=st.sampled_from([0, 1, 6, 60]),
    detokenizers=st.integers(1, 3),
    troubles=st.booleans(),
)
def test_everything_adds_up_and_ends(
    seed: int,
    depth: int,
    block_size: int,
    max_num_seqs: int,
    budgets: tuple[int, int],
    spare_blocks: int,
    detokenizers: int,
    troubles: bool,
) -> None:
    longest = 32
    world = World(
        depth=depth,
        num_blocks=-(-longest // block_size) + spare_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budgets[0],
        max_prefill_tokens=budgets[1],
        max_model_len=longest,
        detokenizers=detokenizers,
    )
    Chaos(world, random.Random(seed), troubles).run(150)


@settings(EXAMPLES, max_examples=30)
@given(seed=st.integers(0, 2**32))
def test_colliding_names_share_nothing(seed: int) -> None:
    """With a hash of two bits nearly every name collides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "name_of", lambda predecessor, tokens: bytes([sum(tokens) % 4]))
        world = World(num_blocks=24, block_size=2, max_model_len=32)
        Chaos(world, random.Random(seed), troubles=False).run(150)


def test_the_driver_preempts_and_hits() -> None:
    """The properties above are worth nothing if these never happen."""
    preemptions = cached = 0
    for seed in range(5):
        world = World(depth=3, num_blocks=14, block_size=4, max_model_len=32)
        Chaos(world, random.Random(seed), troubles=False).run(150)
        preemptions += world.core.stats().preemptions
        cached += world.core.stats().cached_tokens
    assert preemptions > 10
    assert cached > 100
