"""One of several machines is cut off: packets are dropped, not refused. Or a stranger comes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.keys.hostile import assert_nothing_is_answered
from tests.machines.network import Host
from tests.machines.pipeline import Machines, five_machines
from tests.pipeline.leftovers import wait_until_nothing_is_left
from tests.recovery.streams import (
    MODEL_STOPS,
    TIMEOUT_S,
    Outcome,
    Streams,
    mixed_cases,
    undisturbed,
)

CASES = mixed_cases(MODEL_STOPS)


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    running = five_machines("--device", "cpu", "--dtype", "float32")
    try:
        machines = running.__enter__()
    except RuntimeError as error:
        pytest.skip(str(error))
    yield machines
    running.__exit__(None, None, None)


@pytest.fixture(scope="module")
def expected(machines: Machines) -> list[Outcome]:
    return undisturbed(machines.main.endpoint, CASES)


@pytest.mark.parametrize("number", [1, 2, 3], ids=["engine", "only engine left", "tokenizers"])
def test_streams_go_on_while_a_machine_is_cut_off(
    machines: Machines, expected: list[Outcome], number: int
) -> None:
    streams = Streams(machines.main.endpoint, CASES)
    streams.wait_for_news()
    host = machines.network.hosts[number]
    machines.network.cut(host)
    try:
        with streams.pausing():
            machines.wait_until(unreachable=True)
        streams.wait_for_news()
        streams.wait_for_news()
    finally:
        machines.network.heal(host)
    machines.wait_until(unreachable=False)
    streams.wait_for_news()
    check(machines, streams, expected)


def check(machines: Machines, streams: Streams, expected: list[Outcome]) -> None:
    for case, outcome, _ in streams.finish():
        assert outcome == expected[case], f"case {case}\n{machines.main.transcript}"
    wait_until_nothing_is_left(machines.main)


@pytest.mark.parametrize(("one", "other"), [(0, 2), (0, 3), (1, 3)])
def test_streams_go_on_while_two_machines_do_not_reach_each_other(
    machines: Machines, expected: list[Outcome], one: int, other: int
) -> None:
    """The others reach both: an engine without an ingress, a detokenizer without an ingress, a
    detokenizer without an engine."""
    streams = Streams(machines.main.endpoint, CASES)
    streams.wait_for_news()
    pair = machines.network.hosts[one], machines.network.hosts[other]
    machines.network.cut_between(*pair)
    try:
        if one == 0:
            with streams.pausing():
                machines.wait_until(unreachable=True)
        for _ in range(3):
            streams.wait_for_news()
    finally:
        machines.network.heal_between(*pair)
    machines.wait_until(unreachable=False)
    streams.wait_for_news()
    check(machines, streams, expected)


def test_a_machine_without_keys_gets_nowhere(machines: Machines, expected: list[Outcome]) -> None:
    """At every port that is open, while streams run: nothing is answered, and nobody is harmed."""
    streams = Streams(machines.main.endpoint, CASES)
    streams.wait_for_news()
    attacks = []
    for host in machines.network.hosts:
        for port in listening(host):
            hostile = [sys.executable, "-m", "tests.keys.hostile", host.address, str(port), "500"]
            attacks.append(
                subprocess.Popen(
                    [*machines.stranger.within, *hostile], stdout=subprocess.PIPE, text=True
                )
            )
    # The client's socket, that of supervisors, the ingress's for services, two schedulers.
    assert len(attacks) == 5
    for attack in attacks:
        answers, _ = attack.communicate(timeout=TIMEOUT_S)
        assert attack.returncode == 0
        assert_nothing_is_answered(answers)
    streams.wait_for_news()
    check(machines, streams, expected)
    assert all(service.restarts == 0 for service in machines.status)


def listening(host: Host) -> list[int]:
    """The TCP ports on which somebody listens there."""
    told = subprocess.run(
        [*host.within, "ss", "-Hltn"], capture_output=True, text=True, check=True, timeout=60
    )
    return [int(line.split()[3].rpartition(":")[2]) for line in told.stdout.splitlines()]
