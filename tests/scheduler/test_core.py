"""What the scheduler does in the situations that its design names."""

from __future__ import annotations

import msgspec
import pytest

from nanovllm.messages import (
    Begin,
    EngineState,
    Finished,
    Message,
    NewTokens,
    Reset,
    StepPlan,
    Timings,
    pack,
    unpack,
    unpack_int64,
)
from nanovllm.transport.links import Peer
from tests.scheduler.fakes import FakeDetokenizer, next_token
from tests.scheduler.world import World


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """All that detokenizers are told."""
    messages: list[Message] = []
    take = FakeDetokenizer.take

    def record(self: FakeDetokenizer, taken: list[Message]) -> None:
        messages.extend(taken)
        take(self, taken)

    monkeypatch.setattr(FakeDetokenizer, "take", record)
    return messages


def decodes(plan: StepPlan) -> list[int]:
    slots: list[int] = unpack(plan.decode).tolist()
    return slots


def chunks(plan: StepPlan) -> list[list[int]]:
    rows: list[list[int]] = unpack(plan.prefill).reshape(-1, 3).tolist()
    return rows


def stops_at(request_number: int, prompt_tokens: int, offset: int) -> int:
    """A stop token that the n-th request of a world samples at `offset` (and not before)."""
    sampled = [next_token(request_number, prompt_tokens + i) for i in range(offset + 1)]
    assert sampled[offset] not in sampled[:offset]
    return sampled[offset]


# Plans --------------------------------------------------------------------------------------------


def test_depth_plans_are_in_flight() -> None:
    world = World(depth=3)
    world.submit([1, 2, 3])
    world.pump()
    world.work()
    assert [plan.number for plan in world.worker.plans] == [0, 1, 2]
    assert [chunks(plan) for plan in world.worker.plans] == [[[0, 0, 3]], [], []]
    assert [decodes(plan) for plan in world.worker.plans] == [[], [0], [0]]


@pytest.mark.parametrize(("step_us", "plans"), [(600, 5), (700, 4), (900, 3), (9000, 3)])
def test_more_than_three_plans_are_in_flight_only_while_steps_are_short(
    step_us: int, plans: int
) -> None:
    world = World(depth=5)
    world.worker.step_us = step_us
    world.submit([1, 2, 3], max_tokens=20)
    world.pump()
    assert len(world.worker.inbox) - 1 == 3  # beside the reset
    for results in range(1, 4):
        world.result()
        world.work()
        assert len(world.worker.plans) - results == plans


def test_decodes_come_first_and_bound_the_prefill_beside_them() -> None:
    world = World(depth=1, max_num_batched_tokens=16, max_prefill_tokens=6)
    world.submit([1, 2, 3], max_tokens=20)
    world.pump()
    world.submit(range(30), max_tokens=2)
    world.submit([4], max_tokens=2)
    for _ in range(8):
        world.step()
    plans = world.worker.plans
    assert chunks(plans[1]) == [[1, 0, 6]]
    assert chunks(plans[2]) == [[1, 6, 6]]
    assert chunks(plans[5]) == [[1, 24, 6]], "the last chunk of the first fills the budget"
    assert chunks(plans[6]) == [[2, 0, 1]]
    assert all(decodes(plan)[0] == 0 for plan in plans[1:])


def test_a_step_of_prefill_alone_has_the_whole_budget() -> None:
    world = World(depth=1, max_num_batched_tokens=16, max_prefill_tokens=6)
    world.submit(range(30), max_tokens=1)
    world.run()
    assert chunks(world.worker.plans[0]) == [[0, 0, 16]]
    assert chunks(world.worker.plans[1]) == [[0, 16, 14]]


def test_superfluous_rows_are_dropped_and_the_slot_is_used_again_at_once() -> None:
    world = World(depth=2, max_num_seqs=1)
    first = world.submit([1, 2, 3], max_tokens=20, stop_ids=[stops_at(1, 3, 1)])
    second = world.submit([4, 5, 6], max_tokens=2)
    world.pump()
    world.step()
    world.step()
    plan = world.worker.inbox[-1]
    assert isinstance(plan, StepPlan)
    assert [a.slot for a in plan.admit] == [0], "in the plan after the result that ended it"
    assert unpack(plan.release).tolist() == [0]
    assert world.planner._leftovers, "a row is in flight: its blocks are not free yet"
    world.step()
    assert not world.planner._leftovers
    world.run()
    assert world.is_finished(first)
    assert world.is_finished(second)
    assert world.core.stats().generated == 2 + 2
    world.check_all_delivered()


def test_when_nothing_is_in_flight_a_plan_releases_the_slots() -> None:
    world = World(depth=3)
    world.submit([1, 2, 3], max_tokens=20, stop_ids=[stops_at(1, 3, 1)])
    world.pump()
    world.step()
    world.step()
    world.work()
    assert len(world.worker.plans) == 4, "two have superfluous rows; a fifth has nothing to do"
    world.run()
    assert len(world.worker.plans) == 5
    assert not world.worker.slots


# Blocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [6, 64])
def test_prompts_that_arrive_together_are_computed_once(budget: int) -> None:
    """Whether one step is too small for the prompt that they share, or holds all of them."""
    world = World(depth=2, max_num_seqs=4, max_num_batched_tokens=budget)
    shared = list(range(1, 18))
    for last in range(4):
        world.submit([*shared, last])
    world.run()
    assert world.core.stats().cached_tokens == 3 * 16
    world.check_all_delivered()


def test_the_next_plan_hits_what_this_one_fills() -> None:
    world = World(depth=2)
    world.submit([1, 2, 3, 4, 5, 6, 7, 8, 9])
    world.pump()
    world.submit([1, 2, 3, 4, 5, 6, 7, 8, 10])
    world.step()
    assert world.core.stats().cached_tokens == 8
    world.run()
    world.check_all_delivered()


def test_a_prompt_of_whole_blocks_leaves_one_to_compute(told: list[Message]) -> None:
    world = World()
    world.submit([1, 2, 3, 4, 5, 6, 7, 8])
    world.run()
    world.submit([1, 2, 3, 4, 5, 6, 7, 8])
    world.run()
    begins = [message for message in told if isinstance(message, Begin)]
    assert [(b.prompt_tokens, b.cached_tokens) for b in begins] == [(8, 0), (8, 4)]
    world.check_all_delivered()


def test_blocks_filled_by_decoding_are_hit() -> None:
    world = World(depth=2)
    first = world.submit([1, 2], max_tokens=8)
    world.run()
    world.submit([1, 2, *first.expected[:7]])
    world.run()
    assert world.core.stats().cached_tokens == 8
    world.check_all_delivered()


def test_the_last_token_has_no_kv() -> None:
    """Ten tokens, nine of them computed: the block that the tenth would fill has no name."""
    world = World(depth=2, block_size=5)
    first = world.submit([1, 2], max_tokens=8)
    world.run()
    world.submit([1, 2, *first.expected, 3])
    world.run()
    assert world.core.stats().cached_tokens == 5


def test_the_sequence_admitted_last_is_preempted_and_resumes_first() -> None:
    world = World(depth=2, num_blocks=6, block_size=4, max_model_len=24, max_num_seqs=4)
    old = world.submit([1, 2, 3, 4, 5, 6, 7], max_tokens=12)
    young = world.submit([11, 12, 13, 14, 15, 16, 17], max_tokens=12)
    world.pump()
    while not world.core.stats().preemptions:
        assert world.step()
    late = world.submit([21], max_tokens=1)
    assert list(world.planner.waiting) == [young.submit.uid, late.submit.uid]
    assert list(world.planner.running) == [old.submit.uid]
    world.run()
    assert world.core.stats().preemptions == 1, "one was enough"
    assert world.worker.admitted_seeds == [1, 2, 2, 3]
    world.check_all_delivered()


def test_a_preempted_sequence_keeps_its_tokens_in_flight() -> None:
    """They end it here: it is not computed again."""
    world = World(depth=3, num_blocks=4, block_size=4, max_model_len=16, max_num_seqs=4)
    old = world.submit([1, 2, 3, 4, 5, 6, 7], max_tokens=9)
    young = world.submit([11, 12, 13, 14, 15], max_tokens=2)
    world.pump()
    assert world.core.stats().preemptions == 1, "the old one needs its third block"
    assert list(world.planner._draining) == [young.submit.uid]
    world.run()
    assert world.is_finished(old)
    assert world.is_finished(young)
    assert world.worker.admitted_seeds == [1, 2]
    world.check_all_delivered()


def test_a_request_that_can_never_fit_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks hold eight tokens, and a ninth is sampled."""
    told: list[Message] = []
    monkeypatch.setattr(FakeDetokenizer, "take", lambda self, messages: told.extend(messages))
    world = World(num_blocks=2, block_size=4, max_model_len=64)
    too_long = world.submit(range(20), max_tokens=5)
    cut = world.submit([1, 2, 3], max_tokens=20)
    world.run()
    assert [message for message in told if isinstance(message, Finished)] == [
        Finished(too_long.submit.uid, 0, "length", 0),
        Finished(cut.submit.uid, 0, "length", 6),
    ]


# Requests -----------------------------------------------------------------------------------------


def test_deaths_are_told_on_the_next_connection_and_what_was_missing_is_not() -> None:
    world = World()
    world.lost.clear()
    world.ingress_up({99: 4})
    world.core.worker_down(world.worker_peer)
    world.ingress_up({})
    world.tell_ingress()
    assert world.missing == []
    assert [lost.incarnation for lost in world.lost] == [world.worker_peer.incarnation]


def test_each_connection_of_the_ingress_hears_the_engines_state_and_its_changes() -> None:
    world = World(start=False, num_blocks=32)
    world.pump()
    world.start_worker()
    at = world.settings.scheduler_endpoint(0)
    absent, ready = EngineState(False, 8, 0, 4, at), EngineState(True, 8, 32, 4, at)
    assert world.states == [absent, ready]
    world.ingress_up({})
    world.pump()
    world.core.worker_down(world.worker_peer)
    world.pump()
    assert world.states[2:] == [ready, EngineState(False, 8, 32, 4, at)]


def test_an_output_brought_along_is_told_at_once_and_again_when_it_runs(
    told: list[Message],
) -> None:
    world = World(start=False)
    world.detokenizer_up(0)
    world.submit([1, 2, 3, 4, 5], output=[7], max_tokens=4)
    world.pump()
    assert [type(message) for message in told] == [Begin]
    world.start_worker()
    world.run()
    world.check_all_delivered()
    assert [type(message) for message in told] == [Begin, Begin, NewTokens, NewTokens, Finished]


# The worker group ---------------------------------------------------------------------------------


def test_the_ingress_hears_who_was_in_a_group_that_is_gone() -> None:
    world = World(depth=2, max_num_seqs=2)
    requests = [world.submit([1, 2, 3, number], max_tokens=20) for number in range(4)]
    for _ in range(3):
        world.step()
    world.lost.clear()
    world.core.worker_down(world.worker_peer)
    world.tell_ingress()
    (lost,) = world.lost
    assert Peer.of(lost.service, lost.incarnation) == world.worker_peer
    first_two = [request.submit.uid for request in requests[:2]]
    assert lost.in_hand.uids == first_two, "the others waited"
    assert not lost.in_hand.alone
    world.core.worker_up(world.worker_peer)
    world.tell_ingress()
    assert world.lost[1].in_hand.uids == [], "it was but the link"


@pytest.mark.parametrize("steps", [1, 4])
def test_one_request_is_alone_in_a_group_once_the_rows_of_others_are_back(steps: int) -> None:
    world = World(depth=2)
    ended, other = (world.submit([1, 2, 3, number], max_tokens=20) for number in range(2))
    for _ in range(3):
        world.step()
    world.lost.clear()
    world.end(ended)
    for _ in range(steps - 1):
        world.step()
    world.core.worker_down(world.worker_peer)
    world.tell_ingress()
    (lost,) = world.lost
    assert lost.in_hand.uids == [other.submit.uid]
    assert lost.in_hand.alone == (steps > 1)


def test_the_ingress_hears_who_was_in_a_detokenizer_that_is_gone() -> None:
    world = World(detokenizers=2)
    requests = [world.submit([1, 2, number], max_tokens=20) for number in range(2)]
    for _ in range(3):
        world.step()
    first, second = world.detokenizers
    world.lost.clear()
    world.detokenizer_down(first)
    world.step()
    (lost,) = world.lost
    assert (lost.service, lost.in_hand.alone) == (first.service, True)
    (uid,) = lost.in_hand.uids
    world.end(world.live[uid])
    world.detokenizer_down(second)
    world.tell_ingress()
    (other,) = world.lost[1].in_hand.uids
    assert {uid, other} == {request.submit.uid for request in requests}
    assert not world.lost[1].in_hand.alone, "it was given the first one too"


def test_a_new_group_computes_everything_again() -> None:
    world = World(depth=2)
    world.submit([1, 2, 3, 4, 5], max_tokens=20)
    world.submit([1, 2, 3, 4, 6], max_tokens=20)
    for _ in range(6):
        world.step()
    old, number = world.worker, world.core.group.next_number
    world.work()
    world.restart_worker(32)
    first = world.worker.inbox[0]
    assert first == Reset(number)
    stats = world.core.stats()
    world.core.result(Peer("gpu_worker", 0, 101), old.outbox[0])
    assert world.core.stats().generated == stats.generated, "nothing is believed of the old one"
    world.run()
    assert world.core.stats().blocks_total == 32
    assert world.worker.admitted_seeds == [1, 2]
    world.check_all_delivered()


def test_a_result_of_the_wrong_size_is_an_error() -> None:
    world = World(depth=2)
    world.submit([1, 2, 3], max_tokens=20)
    world.pump()
    world.work()
    world.worker.outbox[0].token_ids = pack([1, 2])
    with pytest.raises(ValueError, match="2 rows instead of 1"):
        world.result()


@pytest.mark.parametrize("number", [1, 3, 9])
def test_a_result_that_skips_another_is_an_error(number: int) -> None:
    world = World(depth=3)
    world.submit([1, 2, 3], max_tokens=20)
    world.pump()
    world.work()
    world.worker.outbox[0].number = number
    with pytest.raises(ValueError, match=rf"plan {number} came; .* \[0, 1, 2\]"):
        world.result()


# Detokenizers -------------------------------------------------------------------------------------


def test_the_least_loaded_detokenizer_is_chosen() -> None:
    world = World(detokenizers=3)
    for first_token in range(6):
        world.submit([first_token], max_tokens=4)
    world.run()
    assert [len(d.outputs) for d in world.detokenizers.values()] == [2, 2, 2]


def test_a_step_is_one_message_for_each_detokenizer(told: list[Message]) -> None:
    world = World(detokenizers=2)
    for first_token in range(6):
        world.submit([first_token], max_tokens=30)
    for _ in range(5):
        world.step()
    told.clear()
    world.step()
    assert [type(message) for message in told] == [NewTokens, NewTokens]
    uids = [uid for m in told if isinstance(m, NewTokens) for uid in unpack_int64(m.uids)]
    assert sorted(uids) == sorted(world.live)


def test_a_detokenizer_that_does_not_keep_up_gets_one_merged_message(told: list[Message]) -> None:
    world = World()
    request = world.submit([1, 2], max_tokens=10)
    for _ in range(3):
        world.step()
    world.deaf = set(world.detokenizers)
    for _ in range(4):
        world.step()
    assert not world.core.detokenizers.frames()
    told.clear()
    world.deaf = set()
    world.step()
    assert [type(message) for message in told] == [Begin]
    assert len(world.tokens_of(request)) == 7
    world.run()
    world.check_all_delivered()


def test_logprobs_travel_with_their_tokens_and_are_repeated(told: list[Message]) -> None:
    world = World()
    request = world.submit([1, 2], max_tokens=6, logprobs=0)
    world.submit([1, 2], max_tokens=6)
    for _ in range(4):
        world.step()
    steps = [message for message in told if isinstance(message, NewTokens)]
    assert all(len(step.logprobs) == 1 for step in steps)
    world.detokenizer_up(0)
    told.clear()
    world.run()
    begin = next(m for m in told if isinstance(m, Begin) and m.uid == request.submit.uid)
    assert len(begin.token_logprobs) == len(begin.output) // 4
    world.check_all_delivered()


def test_timings_are_told_of_the_sequences_that_want_them(told: list[Message]) -> None:
    world = World(depth=1, max_num_seqs=1)
    world.submit([1, 2], max_tokens=2)
    plain = world.submit([3], max_tokens=1)
    timed = msgspec.structs.replace(plain.submit, uid=9, timed=True)
    timed.sampling = msgspec.structs.replace(timed.sampling, seed=9, max_tokens=3)
    world.submit_raw(timed)
    world.pump()
    for _ in range(10):
        world.now_ns += 1_000_000
        world.step()
    begins = {begin.uid: begin.timings for begin in told if isinstance(begin, Begin)}
    ended = {finished.uid: finished.timings for finished in told if isinstance(finished, Finished)}
    assert begins == {1: None, 2: None, 9: Timings(3_000, 1_000)}
    assert ended == {1: None, 2: None, 9: Timings(3_000, 1_000, 2_000)}


def test_timings_are_told_where_a_detokenizer_has_begun_before_the_first_token(
    told: list[Message],
) -> None:
    world = World(depth=1)
    plain = world.submit([3], max_tokens=1)
    world.run()
    again = msgspec.structs.replace(
        plain.submit, uid=9, attempt=2, output=pack([next_token(9, 1)]), timed=True
    )
    again.sampling = msgspec.structs.replace(again.sampling, seed=9, max_tokens=4)
    world.submit_raw(again)
    world.pump()
    for _ in range(5):
        world.now_ns += 1_000_000
        world.step()
    of_it = [message for message in told if isinstance(message, Begin) and message.uid == 9]
    assert [begin.timings for begin in of_it] == [None, Timings(0, 1_000)]
    assert Timings(0, 1_000, 2_000) in [m.timings for m in told if isinstance(m, Finished)]
