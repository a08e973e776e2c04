"""What the bar shows of a start."""

from __future__ import annotations

import io
import sys

import pytest

from nanovllm.control import Loading, LoadingStage, ServiceState, ServiceStatus
from nanovllm.progress import LoadingBar, Shown, progress


def service(*loading: Loading, state: ServiceState = "starting") -> ServiceStatus:
    return ServiceStatus(
        role="gpu_worker",
        index=0,
        engine=0,
        pid=1,
        state=state,
        loading=loading[0] if loading else None,
        uptime_s=1.0,
        restarts=0,
        at_s=0.0,
        cpu_s=0.0,
        stats=None,
    )


def test_the_start_is_shown_until_all_are_ready() -> None:
    starting, ready = service(), service(state="ready")
    stages: tuple[LoadingStage, ...] = ("loading weights", "measuring memory", "capturing graphs")
    assert progress([]) is None
    assert progress([starting, ready, starting]) == Shown("starting", 1, 3)
    for stage in stages:
        ranks = [service(Loading(stage, done, 10), state="loading") for done in (3, 4)]
        assert progress([ready, *ranks, starting]) == Shown(stage, 7, 20)
    assert progress([ready, ready, starting]) == Shown("starting", 2, 3)
    assert progress([ready, ready]) is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_only_bytes_have_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    bar = LoadingBar()
    bar.show([])
    assert not terminal.getvalue()
    bar.show([service(state="ready"), service()])
    bar.show([service(Loading("measuring memory", 1, 4), state="loading")])
    shown = terminal.getvalue()
    assert "1/2 services " in shown
    assert "1/4 steps and graphs " in shown
    assert "/s" not in shown
    bar.show([service(Loading("loading weights", 1 << 20, 4 << 20), state="loading")])
    weights = terminal.getvalue().removeprefix(shown)
    assert "1.0 MB/4.2 MB, 0 bytes/s" in weights
    bar.show([service(state="ready"), service(state="ready")])
    assert "services" not in terminal.getvalue().removeprefix(shown)


def test_lines_appear_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with LoadingBar() as bar:
        bar.show([service(state="ready"), service()])
        drawn = len(terminal.getvalue())
        bar.write("a [line]\nand " + "another " * 40)
        written = terminal.getvalue()[drawn:]
    assert "a [line]\nand " + "another " * 40 + "\n" in written
    assert "1/2 services" in written.partition("another \n")[2], "the bar is there again"


def test_a_file_gets_lines_and_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with LoadingBar() as bar:
        bar.show([service()])
        bar.write("a line")
    assert capsys.readouterr().err == "a line\n"
