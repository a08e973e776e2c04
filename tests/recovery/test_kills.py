"""Services are killed in mid-stream, and every stream is as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.pipelines import Pipeline
from tests.recovery.streams import (
    Case,
    Outcome,
    Streams,
    check,
    kill,
    mixed_cases,
    services,
    undisturbed,
)

INGRESS, SCHEDULER = ("ingress", 0), ("scheduler", 0)
RANKS = [("gpu_worker", 0), ("gpu_worker", 1)]
TOKENIZERS = [("tokenizer", 0), ("tokenizer", 1)]
DETOKENIZERS = [("detokenizer", 0), ("detokenizer", 1)]
SEVERAL = ("--tp", "2", "--tokenizers", "2", "--detokenizers", "2")
SIM = ("--device", "sim", "--sim-step-ms", "4")
CPU = ("--device", "cpu", "--max-model-len", "512", "--num-kvcache-blocks", "128")


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


@pytest.mark.parametrize(
    "victims",
    [
        [INGRESS],
        [SCHEDULER],
        *[[place] for place in (*RANKS, *TOKENIZERS, *DETOKENIZERS)],
        RANKS,
        TOKENIZERS,
        DETOKENIZERS,
        [INGRESS, SCHEDULER],
        [SCHEDULER, RANKS[1]],
        [SCHEDULER, DETOKENIZERS[0]],
        [INGRESS, TOKENIZERS[0]],
    ],
    ids=lambda places: " and ".join(f"{role} {index}" for role, index in places),
)
def test_streams_survive_a_kill(running: Running, victims: list[tuple[str, int]]) -> None:
    streams = Streams(running.pipeline.endpoint, running.cases)
    streams.wait_for_news()
    before = services(running.pipeline)
    kill(running.pipeline, *victims)
    streams.wait_for_news()
    streams.wait_for_news()
    check(streams.finish(), running.expected, running.pipeline)
    after = services(running.pipeline)
    assert after.keys() == before.keys()
    assert all(after[place].pid != before[place].pid for place in victims)


def test_streams_survive_the_same_service_killed_again_and_again(running: Running) -> None:
    streams = Streams(running.pipeline.endpoint, running.cases)
    streams.wait_for_news()
    for _ in range(4):
        kill(running.pipeline, SCHEDULER)
        kill(running.pipeline, DETOKENIZERS[1])
    streams.wait_for_news()
    check(streams.finish(), running.expected, running.pipeline)


def test_a_stopped_service_is_killed_and_replaced(running: Running) -> None:
    streams = Streams(running.pipeline.endpoint, running.cases)
    streams.wait_for_news()
    stopped = services(running.pipeline)[SCHEDULER]
    stopped.suspend()
    streams.wait_for_news()
    check(streams.finish(), running.expected, running.pipeline)
    assert services(running.pipeline)[SCHEDULER].pid != stopped.pid
    running.pipeline.wait_for("scheduler 0 is killed: it has given no sign", 5)


def test_a_launch_after_the_supervisor_is_killed_serves_at_once(tmp_path: Path) -> None:
    first = Pipeline("", *SIM).start()
    assert first.process is not None
    first.process.kill()
    again = Pipeline("", *SIM, "--runtime-dir", str(first.runtime_dir))
    again.endpoint, again.runtime_dir = first.endpoint, first.runtime_dir
    with again:
        cases = mixed_cases([])[:2]
        assert all(outcome.completion_tokens for outcome in undisturbed(again.endpoint, cases))
