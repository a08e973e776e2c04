"""Two engines behind one ingress: deaths of one while streams run."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from benchmarks.support.pipeline import REPORT_TIMEOUT_S, Pipeline
from nanovllm import Client, SamplingParams, file_lock
from nanovllm.client.cli import main
from nanovllm.control import SchedulerStats
from nanovllm.names import ENGINE_ROLES, ServiceId
from nanovllm.quietly import QUIET_VARIABLE
from tests.pipeline.leftovers import wait_until_nothing_is_left
from tests.recovery.streams import (
    Outcome,
    Streams,
    kill,
    living,
    mixed_cases,
    services,
    undisturbed,
    wait_for_another,
    wait_until_ready,
)

SIM = ("--device", "sim", "--sim-step-ms", "4", "--kvcache-block-size", "16")
CASES = mixed_cases(["ree", "old "])
SCHEDULERS = [ServiceId("scheduler", 0, engine) for engine in range(2)]
WORKERS = [ServiceId("gpu_worker", 0, engine) for engine in range(2)]


@pytest.fixture(scope="module")
def engines() -> Iterator[Pipeline]:
    with Pipeline("", *SIM, "--engines", "2", "--detokenizers", "2") as pipeline:
        wait_until_ready(pipeline, [*SCHEDULERS, *WORKERS])
        yield pipeline


@pytest.fixture(scope="module")
def expected(engines: Pipeline) -> list[Outcome]:
    return undisturbed(engines.endpoint, CASES)


def test_both_engines_work(engines: Pipeline) -> None:
    deadline = time.monotonic() + REPORT_TIMEOUT_S
    while True:  # the ingress may hear a moment later that an engine is ready
        undisturbed(engines.endpoint, CASES)
        stats = {service.service: service.stats for service in engines.status().services}
        reports = [stats[scheduler] for scheduler in SCHEDULERS]
        if all(isinstance(report, SchedulerStats) and report.generated for report in reports):
            return
        assert time.monotonic() < deadline, reports


@pytest.mark.parametrize(
    "victims",
    [[SCHEDULERS[0]], [WORKERS[1]], [SCHEDULERS[1], WORKERS[0]], WORKERS, SCHEDULERS],
    ids=lambda victims: " and ".join(map(str, victims)),
)
def test_streams_survive_the_death_of_engines(
    engines: Pipeline, expected: list[Outcome], victims: list[ServiceId]
) -> None:
    streams = Streams(engines.endpoint, CASES)
    streams.wait_for_news()
    kill(engines, *victims)
    streams.wait_for_news()
    streams.wait_for_news()
    for number, outcome, _ in streams.finish():
        assert outcome == expected[number], f"case {number}\n{engines.transcript}"
    wait_until_ready(engines, [*SCHEDULERS, *WORKERS])
    wait_until_nothing_is_left(engines)


def test_no_stream_waits_for_an_engine_that_is_gone(engines: Pipeline) -> None:
    """One engine is killed again and again before it can be ready."""
    with Client(engines.endpoint) as client:
        params = SamplingParams(max_tokens=100, ignore_eos=True, seed=1)
        whole = client.generate("Once", params).token_ids
        for _ in range(3):
            streams = [client.generate("Once", params, stream=True) for _ in range(4)]
            for stream in streams:
                next(iter(stream))
            kill(engines, WORKERS[0])
            assert all(stream.result().token_ids == whole for stream in streams)
    wait_until_ready(engines, WORKERS)


def test_a_worker_starts_quietly_beside_an_engine_that_runs(engines: Pipeline) -> None:
    (before,) = living(engines, WORKERS[:1])
    before.kill()
    wait_for_another(engines, WORKERS[0], before)
    assert QUIET_VARIABLE in services(engines)[WORKERS[0]].environ()
    wait_until_ready(engines, WORKERS)


def command(pipeline: Pipeline, *words: str) -> None:
    ran = CliRunner().invoke(main, [*words, "--runtime-dir", str(pipeline.runtime_dir)])
    assert ran.exit_code == 0, ran.output


def test_engines_are_restarted_and_scaled_while_streams_run(
    engines: Pipeline, expected: list[Outcome]
) -> None:
    before = services(engines)
    streams = Streams(engines.endpoint, CASES)
    streams.wait_for_news()
    for words in (("restart", "engine"), ("scale", "engine", "3"), ("scale", "engine", "1")):
        command(engines, *words)
        streams.wait_for_news()
        found = {service.engine for service in services(engines) if service.role == "scheduler"}
        assert found == set(range({"3": 3, "1": 1}.get(words[-1], 2)))
    command(engines, "scale", "engine", "2")
    command(engines, "restart", "gpu_worker")
    for number, outcome, _ in streams.finish():
        assert outcome == expected[number], f"case {number}\n{engines.transcript}"
    wait_until_nothing_is_left(engines)
    after = services(engines)
    assert after.keys() == before.keys()
    assert all(after[service].pid != before[service].pid for service in [*SCHEDULERS, *WORKERS])


def test_an_engine_that_cannot_start_ends_no_stream(
    engines: Pipeline, expected: list[Outcome]
) -> None:
    streams = Streams(engines.endpoint, CASES)
    streams.wait_for_news()
    held = engines.runtime_dir / "scheduler-2.sock.lock"
    lock = file_lock.hold(held)
    ran = CliRunner().invoke(
        main, ["scale", "engine", "3", "--runtime-dir", str(engines.runtime_dir)]
    )
    file_lock.release(held, lock)
    assert ran.exit_code == 1
    assert "scheduler 2 cannot start" in ran.output
    assert "the other services go on" in ran.output
    for number, outcome, _ in streams.finish():
        assert outcome == expected[number], f"case {number}\n{engines.transcript}"
    assert {s.engine for s in services(engines) if s.role in ENGINE_ROLES} == {0, 1}
    command(engines, "scale", "engine", "3")
    command(engines, "scale", "engine", "2")
