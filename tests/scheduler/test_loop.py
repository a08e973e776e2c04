"""The scheduler as a process, among peers over real sockets."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from nanovllm.control import Ready, Report, SchedulerStats, ToSupervisor
from nanovllm.messages import (
    Begin,
    End,
    EngineState,
    Finished,
    GroupReady,
    Held,
    Missing,
    NewTokens,
    Reset,
    SchedulerToDetokenizer,
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
from nanovllm.protocol import Sampling
from tests.peer import Neighbourhood

UID = (77 << 32) + 1


class Neighbours(Neighbourhood):
    """The supervisor, the ingress, a detokenizer and rank 0 of a worker group."""

    def __init__(self) -> None:
        super().__init__(max_num_seqs=4, max_model_len=64, kvcache_block_size=4)
        at = self.settings
        self.supervisor = self.binds("supervisor", at.control_endpoint, list[ToSupervisor])
        self.ingress = self.binds("ingress", at.services_endpoint, list[SchedulerToIngress])
        self.detokenizer = self.connects(
            "detokenizer", at.scheduler_endpoint(0), list[SchedulerToDetokenizer]
        )
        self.worker = self.connects("gpu_worker", at.scheduler_endpoint(0), list[SchedulerToWorker])


def state(n: Neighbours, ready: bool, blocks: int) -> EngineState:
    return EngineState(ready, 4, blocks, 4, n.settings.scheduler_endpoint(0))


@pytest.fixture
def neighbours() -> Iterator[Neighbours]:
    with Neighbours() as neighbours:
        process = neighbours.start("scheduler")
        yield neighbours
        assert process.poll() is None, "it has ended by itself"


def test_a_scheduler_that_misses_a_result_ends_to_be_started_again() -> None:
    with Neighbours() as n:
        process = n.start("scheduler")
        n.worker.send(GroupReady(32, 4))
        n.ingress.send(Held(b"", b""), submit(max_tokens=20))
        first, second = n.worker.expect(StepPlan), n.worker.expect(StepPlan)
        n.worker.send(answer(second, 10))
        code, output = n.ended(process)
    assert code == 1
    assert f"the result of plan {second.number} came; next are those of [{first.number}, " in output


def submit(uid: int = UID, max_tokens: int = 3) -> Submit:
    sampling = Sampling(max_tokens=max_tokens, stop_token_ids=[99], seed=1)
    return Submit(uid, 0, pack([1, 2, 3, 4, 5]), b"", 0, sampling, "")


def answer(plan: StepPlan, *tokens: int) -> StepResult:
    return StepResult(plan.number, pack(tokens), [], 2000 * (plan.number + 1), 0)


def scheduler_report(n: Neighbours, matches: Callable[[SchedulerStats], bool]) -> SchedulerStats:
    def of_scheduler(report: Report) -> bool:
        return isinstance(report.stats, SchedulerStats) and matches(report.stats)

    stats = n.supervisor.expect(Report, of_scheduler).stats
    assert isinstance(stats, SchedulerStats)
    return stats


def test_a_request_from_submit_to_end(neighbours: Neighbours) -> None:
    n = neighbours
    n.supervisor.expect(Ready)
    assert n.ingress.expect(EngineState) == state(n, False, 0)
    n.worker.send(GroupReady(num_blocks=32, block_size=4))
    assert n.worker.expect(Reset).number == 0
    assert n.ingress.expect(EngineState) == state(n, True, 32)

    n.ingress.send(Held(b"", b""), submit())
    plan = n.worker.expect(StepPlan)
    assert unpack(plan.admit[0].tokens).tolist() == [1, 2, 3, 4, 5]
    assert unpack(plan.prefill).tolist() == [0, 0, 5]
    second = n.worker.expect(StepPlan)
    assert unpack(second.decode).tolist() == [0], "sent before the first has a result"
    n.worker.send(answer(plan, 10))
    begin = n.detokenizer.expect(Begin)
    assert (begin.uid, unpack(begin.output).tolist(), begin.prompt_tokens) == (UID, [10], 5)

    third = n.worker.expect(StepPlan)
    n.worker.send(answer(second, 11), answer(second, 12))
    new = n.detokenizer.expect(NewTokens)
    assert unpack_int64(new.uids) == [UID]
    assert (unpack(new.offsets).tolist(), unpack(new.token_ids).tolist()) == ([1], [11])
    n.worker.send(answer(third, 12))
    assert unpack(n.detokenizer.expect(NewTokens).token_ids).tolist() == [12]
    assert n.detokenizer.expect(Finished) == Finished(UID, 0, "length", 3)
    release = n.worker.expect(StepPlan)
    assert unpack(release.release).tolist() == [0]
    n.worker.send(answer(release))

    assert scheduler_report(n, lambda stats: stats.steps == 4).records == 1
    n.ingress.send(End(UID, 0))
    assert n.detokenizer.expect(End) == End(UID, 0)
    stats = scheduler_report(n, lambda stats: stats.steps == 4 and stats.records == 0)
    assert (stats.running, stats.blocks_used, stats.generated) == (0, 0, 3)


def test_a_new_worker_group_computes_again(neighbours: Neighbours) -> None:
    n = neighbours
    assert not n.ingress.expect(EngineState).ready
    n.worker.send(GroupReady(32, 4))
    n.worker.expect(Reset)
    assert n.ingress.expect(EngineState).ready
    n.ingress.send(Held(b"", b""), submit(max_tokens=20))
    plan = n.worker.expect(StepPlan)
    n.worker.send(answer(plan, 10))
    n.detokenizer.expect(Begin)

    n.worker.leave()
    assert not n.ingress.expect(EngineState).ready
    n.worker.come_back(reborn=True)
    n.worker.send(GroupReady(16, 4))
    reset = n.worker.expect(Reset)
    again = n.worker.expect(StepPlan)
    assert again.number == reset.number == 4
    assert unpack(again.admit[0].tokens).tolist() == [1, 2, 3, 4, 5, 10]
    assert n.ingress.expect(EngineState).ready


def test_each_connection_of_the_ingress_says_what_is_to_be_here(neighbours: Neighbours) -> None:
    n = neighbours
    n.ingress.send(Held(b"", b""), submit(UID), submit(UID + 1))
    scheduler_report(n, lambda stats: stats.records == 2)
    for reborn, held in ((False, {UID: 0, UID + 9: 3}), (True, {UID + 9: 4})):
        n.ingress.come_back(reborn=reborn)
        n.ingress.send(Held(pack_int64(held), pack(held.values())))
        assert n.ingress.expect(Missing) == Missing(pack_int64([UID + 9]), pack([held[UID + 9]]))
        assert n.ingress.expect(EngineState) == state(n, False, 0)
    scheduler_report(n, lambda stats: stats.records == 0)
