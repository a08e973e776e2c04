"""A request that brings services down is set aside, and the others go on as if nothing had been."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.support.pipeline import Pipeline
from nanovllm.names import ServiceId
from tests.pipeline.leftovers import wait_until_nothing_is_left
from tests.pipeline.wire import Answer, Wire
from tests.recovery.streams import kill, living, wait_for_another

FAULT = Path(__file__).parent / "fault"
GUILTY = 1272  # <|im_start|>, which the simulated device never samples
SIM = ("--device", "sim", "--sim-step-ms", "4", "--kvcache-block-size", "16")
WORKER, SCHEDULER, TOKENIZER = map(ServiceId, ("gpu_worker", "scheduler", "tokenizer"))
ALONE_AND_TOGETHER = 5  # deaths after which a guilty request is found at the latest


def innocent(number: int) -> dict[str, Any]:
    return {
        "prompt": "Once upon a time",
        "sampling": {"max_tokens": 200, "seed": number, "temperature": number % 2},
    }


def output(answer: Answer) -> tuple[list[int], str, str]:
    return answer.token_ids, answer.text, answer.finish.finish_reason


@pytest.mark.parametrize(
    ("role", "arguments"),
    [
        ("gpu_worker", (*SIM, "--tp", "2")),
        ("gpu_worker", (*SIM, "--engines", "3", "--detokenizers", "2")),
        ("tokenizer", (*SIM, "--tokenizers", "2")),
    ],
    ids=["worker group", "three engines", "tokenizers"],
)
def test_a_guilty_request_is_set_aside_and_the_others_finish(
    role: str,
    arguments: tuple[str, ...],
    start_pipeline: Callable[..., Pipeline],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = [str(FAULT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("NANOVLLM_TEST_FAULT", f"{role}:{GUILTY}")
    pipeline = start_pipeline("", *arguments)
    with Wire(pipeline.endpoint) as wire:
        expected = wire.ask_all(map(innocent, range(4)))
        wire.results(*expected)
        before = wire.ask_all(map(innocent, range(4)))
        wire.until(lambda: all(answer.token_ids for answer in before))
        guilty = wire.ask(prompt_token_ids=[5, GUILTY, 6])
        after = wire.ask_all(map(innocent, range(4)))
        wire.results(guilty, *before, *after)
    assert guilty.error.code == "poisoned", guilty.error
    assert role in guilty.error.message
    assert [*map(output, before)] == [*map(output, expected)]
    assert [*map(output, after)] == [*map(output, expected)]
    restarts = {s.role: s.restarts for s in pipeline.status().services}
    assert all(not count for other, count in restarts.items() if other != role)
    crashes = [line for line in pipeline.output if "was killed by SIGABRT" in line]
    ranks = 2 if "--tp" in arguments else 1
    assert 2 <= len(crashes) <= ranks * ALONE_AND_TOGETHER
    wait_until_nothing_is_left(pipeline)


def wait_for_more(wire: Wire, answers: list[Answer]) -> None:
    """Returns when each has brought more, or ended."""
    had = [len(answer.token_ids) for answer in answers]
    wire.until(
        lambda: all(a.end or len(a.token_ids) > h for a, h in zip(answers, had, strict=True))
    )


@pytest.fixture
def sim(start_pipeline: Callable[..., Pipeline]) -> Pipeline:
    return start_pipeline("", *SIM)


def test_neither_kills_from_outside_nor_bystanders_poison_a_request(
    sim: Pipeline,
) -> None:
    """A stream that is alone at every kill, and streams that are there when services crash."""
    long = {"max_tokens": 600, "ignore_eos": True, "seed": 1}
    with Wire(sim.endpoint) as wire:
        expected = wire.ask(prompt="Once", sampling=long)
        wire.results(expected)
        alone = wire.ask(prompt="Once", sampling=long)
        for service in (WORKER, SCHEDULER, WORKER, SCHEDULER, WORKER, TOKENIZER):
            wait_for_more(wire, [alone])
            kill(sim, service)
        wire.results(alone)
        assert output(alone) == output(expected)
        streams = [wire.ask(prompt="Once", sampling=long) for _ in range(4)]
        for service in (WORKER, SCHEDULER, WORKER):
            wait_for_more(wire, streams)
            (victim,) = living(sim, [service])
            victim.send_signal(signal.SIGSEGV)
            wait_for_another(sim, service, victim)
        wire.results(*streams)
        assert [*map(output, streams)] == [output(expected)] * 4
    assert any("runs alone" in line for line in sim.output)
    wait_until_nothing_is_left(sim)
