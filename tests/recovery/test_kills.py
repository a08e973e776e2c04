"""Services are killed in mid-stream, and every stream is as if nothing had happened."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import psutil
import pytest

from benchmarks.support.pipeline import Pipeline
from nanovllm import Client, SamplingParams
from nanovllm.control import WorkerStats
from nanovllm.names import ServiceId
from tests.readers import free_tcp_endpoint
from tests.recovery.streams import (
    TIMEOUT_S,
    Case,
    Outcome,
    Streams,
    check,
    kill,
    living,
    mixed_cases,
    services,
    undisturbed,
    wait_until_ready,
)

# Of long steps.
PLANS_IN_FLIGHT = 3
INGRESS, SCHEDULER = ServiceId("ingress", 0), ServiceId("scheduler", 0)
RANKS = [ServiceId("gpu_worker", 0), ServiceId("gpu_worker", 1)]
TOKENIZERS = [ServiceId("tokenizer", 0), ServiceId("tokenizer", 1)]
DETOKENIZERS = [ServiceId("detokenizer", 0), ServiceId("detokenizer", 1)]
ALL = [INGRESS, SCHEDULER, *RANKS, *TOKENIZERS, *DETOKENIZERS]
SEVERAL = ("--tp", "2", "--tokenizers", "2", "--detokenizers", "2")
SIM = ("--device", "sim", "--sim-step-ms", "4")
CPU = ("--device", "cpu", "--max-model-len", "512", "--num-kvcache-blocks", "128")
# After these deaths the ranks compute again what they had computed.
COMPUTED_AGAIN = [[INGRESS], *([rank] for rank in RANKS), [SCHEDULER, RANKS[1]]]
# After these the ranks do nothing that they do not do after the others.
OTHERS = [
    [SCHEDULER],
    RANKS,
    [INGRESS, SCHEDULER],
    [TOKENIZERS[0]],
    [DETOKENIZERS[0]],
    TOKENIZERS,
    DETOKENIZERS,
    [SCHEDULER, DETOKENIZERS[0]],
    [INGRESS, TOKENIZERS[0]],
]


class Running(NamedTuple):
    pipeline: Pipeline
    cases: list[Case]
    expected: list[Outcome]


@pytest.fixture(scope="module", params=["sim", "cpu, two ranks"])
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    device: tuple[str, ...] = SIM
    stops = ["ree", "old "]
    if request.param != "sim":
        device, stops = CPU, [" lantern", "kettle", ". T"]
    with Pipeline("", *device, *SEVERAL, "--kvcache-block-size", "16") as pipeline:
        cases = mixed_cases(stops)
        expected = undisturbed(pipeline.endpoint, cases)
        assert any(outcome.finish_reason == "stop" for outcome in expected)
        assert any(not outcome.text.isascii() for outcome in expected)
        yield Running(pipeline, cases, expected)


def names(victims: list[ServiceId]) -> str:
    return " and ".join(map(str, victims))


def kill_in_mid_stream(running: Running, victims: list[ServiceId]) -> None:
    """Fails unless every stream ends as expected and the victims are replaced."""
    streams = Streams(running.pipeline.endpoint, running.cases)
    streams.wait_for_news()
    before = {victim.pid for victim in living(running.pipeline, victims)}
    kill(running.pipeline, *victims)
    streams.wait_for_news()
    streams.wait_for_news()
    check(streams.finish(), running.expected, running.pipeline)
    wait_until_ready(running.pipeline, ALL)
    after = {service.pid for service in living(running.pipeline, victims)}
    assert before.isdisjoint(after)


@pytest.mark.parametrize("victims", COMPUTED_AGAIN, ids=names)
def test_streams_survive_a_kill(running: Running, victims: list[ServiceId]) -> None:
    kill_in_mid_stream(running, victims)


@pytest.mark.parametrize("running", ["sim"], indirect=True)
@pytest.mark.parametrize("victims", OTHERS, ids=names)
def test_streams_survive_other_kills(running: Running, victims: list[ServiceId]) -> None:
    kill_in_mid_stream(running, victims)


def test_streams_survive_the_same_service_killed_again_and_again(running: Running) -> None:
    streams = Streams(running.pipeline.endpoint, running.cases)
    streams.wait_for_news()
    for _ in range(4):
        kill(running.pipeline, SCHEDULER)
        kill(running.pipeline, DETOKENIZERS[1])
    streams.wait_for_news()
    check(streams.finish(), running.expected, running.pipeline)


@pytest.mark.parametrize("running", ["cpu, two ranks"], indirect=True)
def test_a_scheduler_dies_with_plans_in_flight(running: Running) -> None:
    """Rank 1 stands still in the middle of a step, so that its plan and the next one outlive the
    scheduler that sent them. The new scheduler's reset has to wait for them."""
    # On a busy machine the scheduler may need longer to start than a rank may stand still.
    assert any(ranks_outlive_the_scheduler(running) for _ in range(4))


def ranks_outlive_the_scheduler(running: Running) -> bool:
    pipeline = running.pipeline
    streams = Streams(pipeline.endpoint, running.cases)
    streams.wait_for_news()
    before = services(pipeline)
    rank_1 = before[RANKS[1]]
    rank_1.suspend()
    try:
        pipeline.stats_once(WorkerStats, lambda rank_0: rank_0.in_flight == PLANS_IN_FLIGHT)
        kill(pipeline, SCHEDULER)
        wait_until_ready(pipeline, [SCHEDULER])
        pipeline.stats_once(WorkerStats, lambda rank_0: rank_0.in_flight == PLANS_IN_FLIGHT)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank_1.resume()
    streams.wait_for_news()
    check(streams.finish(), running.expected, pipeline)
    wait_until_ready(pipeline, ALL)
    after = services(pipeline)
    assert after[SCHEDULER].pid != before[SCHEDULER].pid
    return [after[rank].pid for rank in RANKS] == [before[rank].pid for rank in RANKS]


@pytest.mark.parametrize("running", ["sim"], indirect=True)
def test_a_stopped_service_is_killed_and_replaced(running: Running) -> None:
    streams = Streams(running.pipeline.endpoint, running.cases)
    streams.wait_for_news()
    (stopped,) = living(running.pipeline, [SCHEDULER])
    stopped.suspend()
    streams.wait_for_news()
    check(streams.finish(), running.expected, running.pipeline)
    (other,) = living(running.pipeline, [SCHEDULER])
    assert other.pid != stopped.pid
    running.pipeline.wait_for("scheduler 0 is killed: it has given no sign", 5)
    blamed = [line for line in running.pipeline.output if "died by itself" in line]
    assert not blamed, "who is stopped or killed from outside has not died by itself"


def test_a_launch_after_the_supervisor_is_killed_serves_at_once() -> None:
    """On the same endpoints; and a stream of the pipeline that was killed goes on there."""
    endpoint = free_tcp_endpoint()
    first = Pipeline("", *SIM, "--ingress", endpoint).start()
    with Client(endpoint, timeout=TIMEOUT_S) as client:
        long = SamplingParams(max_tokens=500, ignore_eos=True, seed=1)
        whole = client.generate("Once", long)
        stream = client.generate("Once", long, stream=True)
        next(stream)
        first.process.kill()
        again = Pipeline("", *SIM, "--runtime-dir", str(first.runtime_dir), "--ingress", endpoint)
        with again:
            assert stream.result().token_ids == whole.token_ids
