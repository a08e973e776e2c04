"""The processes of services, as the supervisor sees them: start, output, end; and its signals."""

from __future__ import annotations

import collections
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from nanovllm.control import Loading, Ready, Report, ServiceState, ServiceStatus
from nanovllm.exit_codes import EXIT_FOLLOWED, EXIT_MISCONFIGURED
from nanovllm.log import Event, event_of
from nanovllm.names import ServiceId
from nanovllm.options import settings_argv
from nanovllm.output import PIPE_BYTES, output_pipe
from nanovllm.service import LIFELINE_VARIABLE, REASON_PREFIX
from nanovllm.settings import Settings

# The last lines of a service's output are kept, to show them if the service ends.
LAST_LINES = 20
# What one wake-up reads of a service's output, and where a line without an end is cut: a service
# that writes without end keeps the supervisor from nothing.
READ_BYTES = 1 << 14
LINE_BYTES = 1 << 14
# NumPy starts a thread for each core when imported, though only real GPU workers multiply matrices.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}


class Lifeline:
    """A pipe whose write end this process alone holds: services end when the pipe breaks."""

    def __init__(self) -> None:
        self.read_end, self._write_end = os.pipe()

    def close(self) -> None:
        os.close(self.read_end)
        os.close(self._write_end)


class ServiceProcess:
    """One process of a service: its output, its end, and what it last reported."""

    def __init__(
        self,
        service_id: ServiceId,
        settings: Settings,
        lifeline: Lifeline,
        environment: dict[str, str],
        descriptors: list[int],
    ) -> None:
        self.id = service_id
        self.stopping: signal.Signals | None = None  # the signal that told it to end
        self.alive = True  # until its end was noticed, see `close`
        self.incarnation: int | None = None  # None until it has said hello
        self.reason: str | None = None  # why it cannot start, if it has said so
        self.loading: Loading | None = None
        self.ready: Ready | None = None
        self.last_lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self._report: Report | None = None
        self._started = time.monotonic()
        self._partial = b""
        self.floods = False  # whether it has written more than one wake-up reads
        command = [sys.executable, "-m", f"nanovllm.services.{service_id.role}"]
        command += ["--index", str(service_id.index), "--engine", str(service_id.engine)]
        computes = service_id.role == "gpu_worker" and settings.device != "sim"
        self.output, write_end = output_pipe()
        self.process = subprocess.Popen(
            [*command, *settings_argv(settings)],
            stdin=subprocess.DEVNULL,
            stdout=write_end,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                **({} if computes else ONE_THREAD),
                LIFELINE_VARIABLE: str(lifeline.read_end),
                **environment,
            },
            pass_fds=[lifeline.read_end, *descriptors],
            process_group=0,  # the terminal's Ctrl-C is for the supervisor
        )
        os.close(write_end)

    def note(self, said: Loading | Ready | Report) -> None:
        """Keeps the latest message of each kind."""
        if isinstance(said, Loading):
            self.loading = said
        elif isinstance(said, Ready):
            self.ready = said
        else:
            self._report = said

    def events(self) -> list[Event]:
        """What it has logged and written, a complete line an event, since the last call, or the
        first of these; at its end all, and an incomplete one. The event with its `reason` is left
        out: `how_it_ended` tells the reason."""
        ended = self.process.poll() is not None
        # A process of its own that it has left behind may write without end, too.
        written = self._read(PIPE_BYTES if ended else READ_BYTES)
        self.floods = len(written) >= READ_BYTES and not ended
        *lines, self._partial = (self._partial + written).split(b"\n")
        if ended or len(self._partial) >= LINE_BYTES:
            lines += [self._partial] if self._partial else []
            self._partial = b""
        return list(self._kept(lines))

    @property
    def stopped(self) -> bool:
        """Whether a signal such as SIGSTOP has stopped it."""
        if self.process.poll() is not None:
            return False
        what = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.process.pid, what) is not None

    def stop(self, number: signal.Signals) -> None:
        self.stopping = number
        self.process.send_signal(number)

    def close(self) -> None:
        """Called when the process has ended and all its lines were read."""
        self.alive = False
        os.close(self.output)

    def how_it_ended(self) -> str:
        code = self.process.returncode
        if code is None:
            return "hung"
        if self.reason is not None:
            return f"cannot start: {self.reason}"
        return (
            f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        )

    def distance_from_the_cause(self) -> tuple[bool, bool, bool]:
        """A sort key for services that have ended together: first those that cannot run with their
        options, then those that a signal ended, last those that ended because another had."""
        code = self.process.returncode
        return code != EXIT_MISCONFIGURED, code == EXIT_FOLLOWED, code > 0

    def last_words(self, times: int) -> str:
        """How it ended, `times` in a row before it was ready, and its last lines."""
        how = f"{self.id} {self.how_it_ended()}"
        if self.reason is not None:
            return how
        said = [line for line in self.last_lines if line]
        how += " before it was ready"
        how += f", {times} times in a row" if times > 1 else ""
        return "\n  ".join([f"{how}: {said[-1]}" if said else how, *said[:-1]])

    def status(self, restarts: int) -> ServiceStatus:
        state: ServiceState = "loading" if self.loading else "starting"
        if self.ready:
            state = "ready"
        if not self.alive:
            state = "ended"
        return ServiceStatus(
            role=self.id.role,
            index=self.id.index,
            engine=self.id.engine,
            pid=self.process.pid,
            state=state,
            loading=None if self.ready else self.loading,
            uptime_s=time.monotonic() - self._started,
            restarts=restarts,
            at_s=self._report.at_s if self._report else 0.0,
            cpu_s=self._report.cpu_s if self._report else 0.0,
            stats=self._report.stats if self._report else None,
            detail=self.ready.detail if self.ready else "",
        )

    def _read(self, at_most: int) -> bytes:
        try:
            return os.read(self.output, at_most)
        except BlockingIOError:
            return b""

    def _kept(self, lines: list[bytes]) -> Iterator[Event]:
        for line in lines:
            event = event_of(line.decode(errors="replace").rstrip(), str(self.id))
            if event.level == "critical" and event.message.startswith(REASON_PREFIX):
                self.reason = event.message.removeprefix(REASON_PREFIX)
            else:
                self.last_lines += event.lines
                yield event


def end_all(services: list[ServiceProcess], grace_s: float) -> None:
    """Ends every service by SIGTERM, and by SIGKILL if it still runs after `grace_s` seconds."""
    for service in services:
        service.process.terminate()
    deadline = time.monotonic() + grace_s
    for service in services:
        try:
            service.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            service.process.kill()
            service.process.wait()


class SignalPipe:
    """Signals as bytes on a descriptor, for the one poll that waits for everything."""

    def __init__(self, *signals: signal.Signals) -> None:
        self.descriptor, self._write_end = os.pipe()
        os.set_blocking(self.descriptor, False)
        os.set_blocking(self._write_end, False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in signals}
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)

    def caught(self) -> set[int]:
        """The signals that have come since the last call."""
        try:
            return set(os.read(self.descriptor, 4096))
        except BlockingIOError:
            return set()

    def close(self) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self.descriptor)
        os.close(self._write_end)
