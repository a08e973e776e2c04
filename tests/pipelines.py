"""Real pipelines for tests: `nanovllm-launch` as a process, in a runtime directory of its own."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from nanovllm.client.control import Control
from nanovllm.control import SchedulerStats, Status

READY_TIMEOUT_S = 90
END_TIMEOUT_S = 20


class Pipeline:
    """One launched pipeline.

    Args:
        model: as on the command line; "" is the demo checkpoint.
        arguments: further arguments of `nanovllm-launch`. Unless they name an `--ingress`, there is
            no TCP endpoint, so that pipelines do not meet.

    Attributes:
        endpoint: where clients connect.
    """

    def __init__(self, model: Path | str = "", *arguments: str) -> None:
        self.runtime_dir = Path(tempfile.mkdtemp(prefix="nv-"))
        self.endpoint = f"ipc://{self.runtime_dir}/ingress.sock"
        named = [str(model)] if str(model) else []
        ingress = [] if "--ingress" in arguments else ["--ingress", ""]
        self.arguments = [*named, "--runtime-dir", str(self.runtime_dir), *ingress, *arguments]
        self.output: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> Pipeline:
        """Launches, and returns when the pipeline says that it serves.

        Raises:
            RuntimeError: if it ends before, with what it printed.
            TimeoutError: if it does neither.
        """
        self.launch()
        self.wait_for("nanovllm serves", READY_TIMEOUT_S)
        return self

    def launch(self) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nanovllm.launch.cli", *self.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        threading.Thread(target=self._read, daemon=True).start()
        return self.process

    def wait_for(self, text: str, timeout_s: float) -> str:
        """The first line from now on that contains `text`."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"no {text!r} in {timeout_s} s:\n{self.transcript}") from None
            if line is None:
                raise RuntimeError(f"the launcher ended before {text!r}:\n{self.transcript}")
            if text in line:
                return line

    def stop(self) -> int:
        """SIGTERM; the exit code. What it leaves behind is the caller's to look at."""
        if self.process is None:
            raise RuntimeError("not launched")
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise TimeoutError(f"the launcher did not end:\n{self.transcript}") from None
        finally:
            shutil.rmtree(self.runtime_dir, ignore_errors=True)

    def status(self) -> Status:
        """What the services have last reported, once each has."""
        with Control(str(self.runtime_dir)) as control:
            while True:
                status = control.status()
                if all(service.stats is not None for service in status.services):
                    return status

    def scheduler_stats_once(
        self, wanted: Callable[[SchedulerStats], bool], timeout_s: float = 15.0
    ) -> SchedulerStats:
        """The first of the scheduler's reports from now on for which `wanted` holds."""
        start = time.monotonic()
        while True:
            for service in self.status().services:
                if isinstance(service.stats, SchedulerStats):
                    if service.at_s >= start and wanted(service.stats):
                        return service.stats
                    if time.monotonic() > start + timeout_s:
                        raise TimeoutError(f"the scheduler still reports {service.stats}")

    @property
    def transcript(self) -> str:
        return "\n".join(self.output)

    def _read(self) -> None:
        if self.process is None or self.process.stdout is None:
            raise RuntimeError("not launched")
        for line in self.process.stdout:
            self.output.append(line.rstrip())
            self._lines.put(line.rstrip())
        self._lines.put(None)

    def __enter__(self) -> Pipeline:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
