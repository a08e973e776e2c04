"""What is done quietly yields the CPU, and what comes after does not."""

from __future__ import annotations

import os
import threading

import pytest

from nanovllm.quietly import OFF_STEP_PATH_NICENESS, QUIET_VARIABLE, quietly


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def niceness_of_a_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(niceness()))
    thread.start()
    thread.join()
    return found[0]


def test_beside_an_engine_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(QUIET_VARIABLE, "1")
    before = niceness()
    expected = min(before + OFF_STEP_PATH_NICENESS, 19)
    assert quietly(niceness) == expected
    assert quietly(niceness_of_a_thread) == expected
    assert niceness() == niceness_of_a_thread() == before


def test_nobody_to_yield_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(QUIET_VARIABLE, raising=False)
    before = niceness()
    assert quietly(niceness) == before


def test_errors_are_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(QUIET_VARIABLE, "1")

    def fails() -> None:
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        quietly(fails)
