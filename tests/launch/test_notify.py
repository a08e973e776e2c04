"""What a service manager is told, over a real datagram socket, as systemd and Kubernetes ask."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from benchmarks.support.pipeline import END_TIMEOUT_S, READY_TIMEOUT_S, Pipeline
from nanovllm.client.cli import main
from nanovllm.launch.notify import Notifier
from nanovllm.names import ServiceId
from tests.machines.ports import free_services
from tests.recovery.streams import kill

SIM = ("--device", "sim", "--sim-step-ms", "1")


class Manager:
    """The service manager's end of the socket."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.settimeout(READY_TIMEOUT_S)
        self.told: list[str] = []

    def wait_for(self, line: str) -> list[str]:
        """The lines that came since the last call, up to the first that begins so."""
        since: list[str] = []
        while not any(told.startswith(line) for told in since):
            since += self._socket.recv(65536).decode().split("\n")
        self.told += since
        return since

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    address = str(tmp_path / "notify")
    listening = Manager(address)
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setenv("WATCHDOG_USEC", "600000")
    yield listening
    listening.close()


def health(pipeline: Pipeline, *options: str) -> tuple[int, str]:
    words = ["health", *options, "--runtime-dir", str(pipeline.runtime_dir)]
    ran = CliRunner().invoke(main, words)
    return ran.exit_code, ran.output


def test_the_manager_is_told_of_a_whole_run(manager: Manager) -> None:
    with Pipeline("", *SIM, lifeline=False) as pipeline:
        start = manager.wait_for("READY=1")
        assert any(line.startswith("STATUS=not ready: ingress 0") for line in start)
        assert "STATUS=serves demo" in start
        assert health(pipeline, "--ready") == (0, "ready\n")
        for service in psutil.Process(pipeline.process.pid).children():
            assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & service.environ().keys()
        kill(pipeline, ServiceId("gpu_worker"))
        manager.wait_for("STATUS=not ready: gpu_worker 0.0")
        manager.wait_for("STATUS=serves demo")
        for _ in range(3):  # nothing else happens, and still it pings
            manager.wait_for("WATCHDOG=1")
        assert "STOPPING=1" not in manager.told
        pipeline.process.send_signal(signal.SIGTERM)
        manager.wait_for("STOPPING=1")
        assert pipeline.process.wait(END_TIMEOUT_S) == 0
    assert manager.told.count("READY=1") == 1


def test_what_has_joined_is_healthy_without_its_pipeline_and_ready_with_it(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, start_pipeline: Callable[..., Pipeline]
) -> None:
    services = free_services()
    joined = Pipeline("", "--join", services, "--engines", "1")
    joined.launch()
    try:
        manager.wait_for(f"STATUS=waits for a pipeline at {services}")
        assert health(joined)[0] == 1
        monkeypatch.delenv("NOTIFY_SOCKET")
        main_pipeline = start_pipeline("", *SIM, "--services", services, "--engines", "0")
        manager.wait_for("READY=1")
        assert health(joined, "--ready") == (0, "ready\n")
        main_pipeline.process.kill()
        manager.wait_for(f"STATUS=the pipeline at {services} is not reached")
        exit_code, why = health(joined, "--ready")
        assert exit_code == 1
        assert services in why
        assert health(joined)[0] == 0
    finally:
        joined.stop()


def test_an_abstract_socket_and_the_watchdog_of_another_process() -> None:
    name = f"nanovllm-{os.getpid()}"
    manager = Manager(f"\0{name}")
    pid = str(os.getpid())
    told = {"NOTIFY_SOCKET": f"@{name}", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": pid}
    notifier = Notifier(environment := dict(told))
    assert not environment
    notifier.tell(100.0, "starts")
    assert set(manager.wait_for("WATCHDOG=1")) == {"STATUS=starts", "WATCHDOG=1"}
    assert notifier.wait_s(100.2) == pytest.approx(0.3)
    notifier.tell(100.4, "starts")
    notifier.tell(100.6, "starts", ready=True)
    assert set(manager.wait_for("WATCHDOG=1")) == {"READY=1", "WATCHDOG=1"}
    other = Notifier({**told, "WATCHDOG_PID": "1"})
    other.tell(100.0, "starts")
    assert manager.wait_for("STATUS=") == ["STATUS=starts"]
    manager.close()
    notifier.tell(102.0, "nobody is there any more")
    for alone in (notifier, Notifier({"WATCHDOG_USEC": "1"})):
        alone.tell(103.0, "serves")
        assert alone.wait_s(103.0) == math.inf


def test_a_manager_that_is_busy_is_told_later(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    manager = Manager(address)
    notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"})
    other = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    other.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            other.sendto(b"from another", address)
            sent += 1
    notifier.tell(100.0, "serves", ready=True)
    assert 0 < notifier.wait_s(100.0) < 0.5
    for _ in range(sent):
        assert manager.wait_for("from") == ["from another"]
    notifier.tell(100.1, "serves", ready=True)
    assert set(manager.wait_for("READY")) == {"STATUS=serves", "READY=1", "WATCHDOG=1"}
    other.close()
    manager.close()
