"""Real pipelines: `nanovllm-launch` as a process, in a runtime directory of its own."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from nanovllm.client.control import NEXT_REPORT_S, Control
from nanovllm.control import SchedulerStats, Stats, Status, WorkerStats
from nanovllm.service import LIFELINE_VARIABLE

# Long enough for a machine whose cores are busy.
READY_TIMEOUT_S = 200.0
END_TIMEOUT_S = 60.0
REPORT_TIMEOUT_S = 60.0
# Between two looks at the status or at processes: looking takes time from the pipeline.
LOOK_AGAIN_S = 0.05

S = TypeVar("S", bound=Stats)


class Reported(NamedTuple):
    """The latest reports of an engine's scheduler and of its rank 0, and when rank 0's was made, in
    seconds."""

    at_s: float
    worker: WorkerStats
    scheduler: SchedulerStats


class Pipeline:
    """One launched pipeline.

    Args:
        model: as on the command line; "" is the demo checkpoint.
        arguments: further arguments of `nanovllm-launch`. Unless they name an `--ingress` and an
            `--http`, there is no TCP endpoint, so that pipelines do not meet. With `--join` these
            are services of another pipeline.
        lifeline: whether the pipeline ends with this process, however this process ends. Without,
            it is as a shell launches it.
        within: a command that runs the launcher, such as `ip netns exec NAME`.

    Attributes:
        endpoint: where clients connect.
        output: the lines that the launcher has printed.
        start_s: seconds from the launch until the pipeline served.
    """

    def __init__(
        self,
        model: Path | str = "",
        *arguments: str,
        lifeline: bool = True,
        within: Sequence[str] = (),
    ) -> None:
        if "--runtime-dir" not in arguments:
            arguments = ("--runtime-dir", tempfile.mkdtemp(prefix="nv-"), *arguments)
        self.runtime_dir = Path(arguments[arguments.index("--runtime-dir") + 1])
        self.endpoint = f"ipc://{self.runtime_dir}/ingress.sock"
        named = [str(model)] if str(model) else []
        joins = "--join" in arguments
        self._says = "joined the pipeline" if joins else "nanovllm serves"
        endpoints = ("--http",) if joins else ("--ingress", "--http")
        tcp = [option for option in endpoints if option not in arguments]
        without_tcp = [word for option in tcp for word in (option, "")]
        self.arguments = [*named, *without_tcp, *arguments]
        self.output: list[str] = []
        self._within = within
        self.start_s = 0.0
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._lifeline = [*os.pipe()] if lifeline else []
        self._process: subprocess.Popen[str] | None = None

    @property
    def process(self) -> subprocess.Popen[str]:
        """The launcher. Raises RuntimeError before the launch."""
        if self._process is None:
            raise RuntimeError("not launched")
        return self._process

    @property
    def transcript(self) -> str:
        return "\n".join(self.output)

    def start(self) -> Pipeline:
        """Launches, and returns when the pipeline says that it serves.

        Raises:
            RuntimeError: the launcher ends before, with what it printed.
            TimeoutError: the launcher does neither.
        """
        started = time.monotonic()
        self.launch()
        try:
            self.wait_for(self._says, READY_TIMEOUT_S)
        except BaseException:
            self.stop()
            raise
        self.start_s = time.monotonic() - started
        return self

    def launch(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self._lifeline:
            environment[LIFELINE_VARIABLE] = str(self._lifeline[0])
        self._process = subprocess.Popen(
            [*self._within, sys.executable, "-m", "nanovllm.launch.cli", *self.arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            pass_fds=self._lifeline[:1],
            process_group=0,  # the terminal's Ctrl-C is for this program
        )
        threading.Thread(target=self._read, daemon=True).start()
        return self._process

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
        """SIGTERM; the exit code. The processes that are left are the caller's to look at."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise TimeoutError(f"the launcher did not end:\n{self.transcript}") from None
        finally:
            while self._lifeline:
                os.close(self._lifeline.pop())
            shutil.rmtree(self.runtime_dir, ignore_errors=True)

    @property
    def http_port(self) -> int:
        """The port of the HTTP servers; launch with `--http 127.0.0.1:0`."""
        return int(self.status().http.rpartition(":")[2])

    def status(self) -> Status:
        """What the services have last reported, once each has."""
        with Control(str(self.runtime_dir)) as control:
            while True:
                status = control.status()
                if all(service.stats is not None for service in status.services):
                    return status
                time.sleep(LOOK_AGAIN_S)

    def stats_once(self, kind: type[S], wanted: Callable[[S], bool]) -> S:
        """The first report of this kind of service, of those with index 0 and from now on, for
        which `wanted` holds. Raises TimeoutError."""
        start = time.monotonic()
        while True:
            for service in self.status().services:
                if isinstance(service.stats, kind) and service.index == 0:
                    if service.at_s >= start and wanted(service.stats):
                        return service.stats
                    if time.monotonic() > start + REPORT_TIMEOUT_S:
                        raise TimeoutError(f"{service.role} 0 still reports {service.stats}")
            time.sleep(LOOK_AGAIN_S)

    def reported(self) -> Reported:
        """What the first engine reported last, up to a second ago."""
        return self.engines_reported()[0]

    def engines_reported(self) -> list[Reported]:
        """What each engine reported last, up to a second ago."""
        services = [service for service in self.status().services if service.index == 0]
        schedulers = {s.engine: s.stats for s in services if isinstance(s.stats, SchedulerStats)}
        return [
            Reported(service.at_s, service.stats, schedulers[service.engine])
            for service in services
            if isinstance(service.stats, WorkerStats)
        ]

    def settled(self) -> Reported:
        """Reports made from now on."""
        time.sleep(NEXT_REPORT_S)
        return self.reported()

    @contextlib.contextmanager
    def watched(self, reports: list[list[Reported]]) -> Iterator[None]:
        """Meanwhile, `reports` grows by one of all engines a second."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(NEXT_REPORT_S):
                reports.append(self.engines_reported())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line.rstrip())
            self._lines.put(line.rstrip())
        self._lines.put(None)

    def __enter__(self) -> Pipeline:
        return self.start()

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            error.add_note(self.transcript)
        self.stop()
