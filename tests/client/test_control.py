"""Commands whose connection to the supervisor ends before they are done."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from nanovllm.client.control import Control
from nanovllm.client.results import PipelineUnavailable
from nanovllm.control import Done, Restart, ToSupervisor
from nanovllm.transport.links import Up
from tests.peer import TIMEOUT_S, FakePeer, Neighbourhood


@contextmanager
def restarting() -> Iterator[tuple[FakePeer, Future[None], Restart]]:
    """A supervisor that was asked for a restart, by this process, which waits for its end."""
    with Neighbourhood() as here, ThreadPoolExecutor(1) as threads:
        supervisor = here.binds("supervisor", here.settings.control_endpoint, list[ToSupervisor])
        with Control(str(here.runtime_dir)) as control:
            told = threads.submit(control.command, Restart("engine"))
            asked = supervisor.expect(Restart, index=os.getpid())
            assert asked.role == "engine"
            yield supervisor, told, asked
            told.exception(TIMEOUT_S)


def test_a_command_outlives_its_connection() -> None:
    with restarting() as (supervisor, told, asked):
        for _ in range(2):
            supervisor.come_back(reborn=False)
            assert supervisor.expect(Restart, index=os.getpid()) == asked
        supervisor.send(Done("of another command", asked.number + 1))
        supervisor.send(Done(None, asked.number))
        told.result(TIMEOUT_S)


def test_the_end_of_a_command_tells_what_went_wrong() -> None:
    with restarting() as (supervisor, told, asked):
        supervisor.come_back(reborn=False)
        supervisor.send(Done("not now", asked.number))
        with pytest.raises(ValueError, match="not now"):
            told.result(TIMEOUT_S)


def test_another_supervisor_does_not_know_the_command() -> None:
    with restarting() as (supervisor, told, _):
        supervisor.come_back(reborn=True)
        supervisor.expect(Up, index=os.getpid())
        with pytest.raises(PipelineUnavailable, match="ended before it was done"):
            told.result(TIMEOUT_S)


def test_a_supervisor_that_does_not_come_back_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nanovllm.client.control.BACK_S", 0.1)
    with restarting() as (supervisor, told, _):
        supervisor.leave()
        with pytest.raises(PipelineUnavailable, match="ended before it was done"):
            told.result(TIMEOUT_S)
