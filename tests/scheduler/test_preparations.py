"""Sequences with a grammar take a slot once their matchers are ready, and hold nobody else up."""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm.messages import (
    TOO_COSTLY,
    End,
    Finished,
    GroupReady,
    InHand,
    Keep,
    Lost,
    Prepare,
    Prepared,
    Reset,
    SchedulerToWorker,
    StepPlan,
    StepResult,
    Submit,
    pack,
    unpack,
    unpack_int64,
)
from nanovllm.protocol import Sampling, StructuredOutputs
from nanovllm.services.scheduler.core import Scheduler
from nanovllm.settings import Settings
from nanovllm.transport.links import Peer

FIRST = 70 << 32
OUTPUTS = StructuredOutputs(regex="a+")
WORKER = Peer("gpu_worker", 0, 1)
DETOKENIZER = Peer("detokenizer", 0, 1)


class World:
    """A scheduler between its worker group and a detokenizer, which are played by the tests."""

    def __init__(self, num_blocks: int = 100) -> None:
        settings = Settings(max_num_seqs=4, max_model_len=64, kvcache_block_size=4)
        self.core = Scheduler(settings, first_matcher=FIRST)
        self.core.detokenizer_up(DETOKENIZER)
        self.num_blocks = num_blocks
        self.core.worker_up(WORKER)
        self.core.group_ready(WORKER, GroupReady(num_blocks, 4))

    def submit(
        self, uid: int, outputs: StructuredOutputs | None, output: Sequence[int] = ()
    ) -> None:
        sampling = Sampling(seed=uid, max_tokens=20, structured_outputs=outputs)
        self.core.from_ingress(Submit(uid, 0, pack([1, 2, 3]), pack(output), 0, sampling, ""))

    def said(self) -> list[SchedulerToWorker]:
        """Makes the plans that can be made; what the worker is told."""
        while self.core.plan():
            self.core.settle()
        self.core.settle()
        messages = self.core.group.unsent
        self.core.group.sent()
        return messages

    def prepared(self, number: int, failed: bool = False) -> None:
        self.core.prepared(WORKER, Prepared(number, failed))

    def sample(self, plan: StepPlan, *tokens: int) -> None:
        self.core.result(
            WORKER, StepResult(plan.number, pack(tokens), [], 2000 * (plan.number + 1), 0)
        )

    def finished(self) -> dict[int, str]:
        frames = list(self.core.detokenizers.frames())
        for frame in frames:
            self.core.detokenizers.delivered(frame)
        messages = [message for frame in frames for message in frame.messages]
        return {m.uid: m.reason for m in messages if isinstance(m, Finished)}


def admitted(messages: Sequence[SchedulerToWorker]) -> list[int | None]:
    return [a.matcher for m in messages if isinstance(m, StepPlan) for a in m.admit]


def test_a_grammar_in_preparation_delays_its_own_request_alone() -> None:
    world = World()
    world.submit(1, OUTPUTS, output=[7])
    world.submit(2, None)
    reset, prepare, *plans = world.said()
    assert isinstance(reset, Reset)
    assert prepare == Prepare(FIRST, OUTPUTS, pack([7]), None, alone=False)
    assert admitted(plans) == [None], "the second request overtakes"
    world.prepared(FIRST)
    first = plans[0]
    assert isinstance(first, StepPlan)
    world.sample(first, 5)
    (plan,) = world.said()
    assert isinstance(plan, StepPlan)
    assert admitted([plan]) == [FIRST]
    assert plan.admit[0].sampling.structured_outputs is None, "a plan carries no grammar"
    assert unpack(plan.admit[0].tokens).tolist() == [1, 2, 3, 7]


def test_what_may_be_lost_is_said_again() -> None:
    world = World()
    for uid in (1, 2, 3):
        world.submit(uid, OUTPUTS)
    world.said()
    world.prepared(FIRST)
    plans = world.said()
    assert admitted(plans) == [FIRST]
    world.core.from_ingress(End(2, 0))
    world.core.worker_down(WORKER)
    world.core.worker_up(WORKER)
    reset, keep, prepare, *again = world.said()
    assert isinstance(reset, Reset)
    assert isinstance(keep, Keep)
    assert set(unpack_int64(keep.numbers)) == {FIRST, FIRST + 2}
    assert isinstance(prepare, Prepare)
    assert prepare.number == FIRST + 2
    assert admitted(again) == [FIRST]
    # A matcher that nobody needs any more is not kept.
    world.core.from_ingress(End(3, 0))
    (keep,) = world.said()
    assert keep == Keep(b"".join(n.to_bytes(8, "little") for n in [FIRST]))
    world.prepared(FIRST + 2)
    assert admitted(world.said()) == []


def test_no_request_is_alone_in_a_group_that_may_make_a_matcher_of_another() -> None:
    world = World()
    world.submit(1, None)
    world.submit(2, OUTPUTS)
    world.said()
    world.core.from_ingress(End(2, 0))
    for death, alone in enumerate((False, True), WORKER.incarnation):
        world.core.ingress_told()
        world.core.worker_down(Peer("gpu_worker", 0, death))
        lost = next(m for m in world.core.for_ingress() if isinstance(m, Lost))
        assert lost.in_hand == InHand([1], alone), "after a death the group is a new one"
        world.core.worker_up(Peer("gpu_worker", 0, death + 1))
        world.core.group_ready(Peer("gpu_worker", 0, death + 1), GroupReady(100, 4))
        world.said()


def test_a_new_group_has_no_matchers() -> None:
    world = World()
    world.submit(1, OUTPUTS)
    world.said()
    world.prepared(FIRST)
    (plan, *_) = world.said()
    assert isinstance(plan, StepPlan)
    world.sample(plan, 9)
    other = Peer("gpu_worker", 0, 2)
    world.core.worker_up(other)
    world.core.group_ready(other, GroupReady(world.num_blocks, 4))
    reset, prepare = world.said()
    assert isinstance(reset, Reset)
    assert prepare == Prepare(FIRST + 1, OUTPUTS, pack([9]), None, alone=False)
    assert world.core.stats().waiting == 1


def test_a_preempted_sequence_is_prepared_again() -> None:
    world = World(num_blocks=3)
    world.submit(1, None)
    world.submit(2, OUTPUTS)
    world.said()
    world.prepared(FIRST)
    prepares: list[Prepare] = []
    for _ in range(30):
        prepares += [message for message in world.said() if isinstance(message, Prepare)]
        step = world.core.group._in_flight[0] if world.core.group._in_flight else None
        if step is None or prepares:
            break
        world.sample(step.plan, *[5] * len(step.rows))
    (prepare,) = prepares
    assert prepare.number > FIRST
    assert set(unpack(prepare.output).tolist()) == {5}


def test_a_costly_grammar_gets_a_matcher_of_its_own_and_then_an_error() -> None:
    world = World()
    world.submit(1, OUTPUTS)
    world.submit(2, None)
    world.said()
    world.prepared(FIRST)
    steps = list(world.core.group._in_flight)
    while FIRST not in admitted([steps[0].plan]):
        world.sample(steps[0].plan, *[6] * len(steps[0].rows))
        world.said()
        steps = list(world.core.group._in_flight)
    slot = next(a.slot for a in steps[0].plan.admit if a.matcher == FIRST)
    world.sample(steps[0].plan, *[TOO_COSTLY if r == slot else 6 for r in steps[0].rows])
    prepare = next(m for m in world.said() if isinstance(m, Prepare))
    assert prepare == Prepare(FIRST + 1, OUTPUTS, b"", None, alone=True)
    assert world.finished() == {}
    world.prepared(FIRST + 1, failed=True)
    world.core.settle()
    assert world.finished() == {1: "too_costly"}
    assert world.core.stats().running == 1, "the other goes on"
