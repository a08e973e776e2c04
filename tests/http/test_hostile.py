"""A thousand hostile requests: no service restarts, and others do not notice."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

from benchmarks.support.pipeline import Pipeline
from tests.http.hostile import VALID, Hostile
from tests.http.server import Server
from tests.http.test_door import HTTP, SIM
from tests.pipeline.leftovers import wait_until_nothing_is_left

ATTACKERS = 4
REQUESTS = 1000
LIMITS = ("--max-message-bytes", "524288", "--max-model-len", "256")


def test_hostile_requests_disturb_no_one(
    start_pipeline: Callable[..., Pipeline], capsys: pytest.CaptureFixture[str]
) -> None:
    seed = random.randrange(2**31)
    with capsys.disabled():
        print(f"\nseed {seed}")
    pipeline = start_pipeline("", *SIM, *HTTP, *LIMITS)
    door = Server(pipeline.http_port)
    body = VALID | {"seed": 3, "max_tokens": 32}
    expected = door.complete(**body).json["choices"]
    hostile = [Hostile(door.port, seed + number) for number in range(ATTACKERS)]

    def attack(one: Hostile) -> None:
        for _ in range(REQUESTS // ATTACKERS):
            one.attack()

    attackers = [threading.Thread(target=attack, args=(one,)) for one in hostile]
    for thread in attackers:
        thread.start()
    served = 0
    while any(thread.is_alive() for thread in attackers):
        answer = door.complete(**body)
        assert (answer.status, answer.json["choices"]) == (200, expected)
        served += 1
    answers: dict[int, int] = {}
    for one in hostile:
        for connection in one.held:
            connection.close()
        for status, count in one.answers.items():
            answers[status] = answers.get(status, 0) + count
    assert served
    assert answers.keys() <= {0, 200, 400, 404, 405, 408, 413, 431}, answers
    assert answers[400] > REQUESTS / 4, answers
    wait_until_nothing_is_left(pipeline)
    assert all(service.restarts == 0 for service in pipeline.status().services)
    failed = [line for line in pipeline.output if "ERROR" in line or "Traceback" in line]
    assert not failed, pipeline.transcript
