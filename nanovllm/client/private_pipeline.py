"""A pipeline that one program launches for itself, and that ends with the program."""

from __future__ import annotations

import collections
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Final

import msgspec

from nanovllm.client.control import Control
from nanovllm.client.results import PipelineUnavailable
from nanovllm.client.sync import Client
from nanovllm.control import ServiceStatus
from nanovllm.options import settings_argv
from nanovllm.service import LIFELINE_VARIABLE
from nanovllm.settings import Settings
from nanovllm.transport.endpoints import LONGEST_IPC_PATH

# Between SIGTERM to the launcher, which ends its services, and SIGKILL.
END_TIMEOUT_S: Final = 10.0
LAST_LINES: Final = 20
# Begins the launcher's last line, which goes into the exception.
_LAST_WORD: Final = "nanovllm-launch: "
# The write ends that this process holds.
_lifelines: set[int] = set()


class PrivatePipeline:
    """A launched pipeline in a private directory, without a TCP port.

    The launcher holds the read end of a pipe whose write end this process alone holds. When this
    process ends, for whatever reason, the pipe breaks, and the launcher ends every service. A fork
    of this process closes its copy of the write end, and has no part in the pipeline.

    Args:
        settings: the pipeline's settings; `runtime_dir` is replaced, and there is no `http`.
    """

    def __init__(self, settings: Settings) -> None:
        self._owner = os.getpid()
        self._directory = short_private_directory()
        settings = msgspec.structs.replace(settings, runtime_dir=str(self._directory), http="")
        self.runtime_dir = settings.runtime_dir
        self.endpoint = settings.in_runtime_dir("ingress")
        self._last_lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        read_end, self._lifeline = os.pipe()
        _lifelines.add(self._lifeline)
        try:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "nanovllm.launch.cli"),
                    *settings_argv(settings, without=("model",)),
                    *("--", settings.model),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env={**os.environ, LIFELINE_VARIABLE: str(read_end)},
                pass_fds=[read_end],
                process_group=0,  # the terminal's Ctrl-C is for this program
            )
        except BaseException:
            _cut(self._lifeline)
            shutil.rmtree(self._directory, ignore_errors=True)
            raise
        finally:
            os.close(read_end)
        self._reader = threading.Thread(
            target=_pass_on, args=(self._process.stderr, self._last_lines), daemon=True
        )
        self._reader.start()
        self._control: Control | None = None
        self._control_lock = threading.Lock()

    def services(self) -> list[ServiceStatus]:
        """The status of its services; empty before the first has started, and after the end. Any
        thread may ask."""
        with self._control_lock:
            if self._lifeline < 0:
                return []
            try:
                self._control = self._control or Control(self.runtime_dir)
                return self._control.status().services
            except PipelineUnavailable:
                return []

    def wait_until_ready(self, client: Client) -> None:
        """Returns when the pipeline can start requests; `client` is a client of it.

        Raises RuntimeError if the pipeline ends before.
        """
        while True:
            self.check(launching=True)
            with contextlib.suppress(PipelineUnavailable):  # its ingress has not bound yet
                if client.ping().ready:
                    return

    def check(self, *, launching: bool = False) -> None:
        """Raises RuntimeError, with the launcher's last words, if the pipeline has ended. With
        `launching`, the message says that it could not be launched."""
        code = self._process.poll()
        if code is None:
            return
        self._reader.join(timeout=1.0)
        said = [line for line in self._last_lines if line.startswith(_LAST_WORD)]
        words = said[-1].removeprefix(_LAST_WORD) if said else "\n".join(self._last_lines)
        what = "could not be launched" if launching else "has ended"
        raise RuntimeError(f"the pipeline {what}: {words or f'exit code {code}'}")

    def close(self) -> None:
        """Ends the pipeline, and waits until it has ended."""
        if self._lifeline < 0 or os.getpid() != self._owner:  # a forked child is not the owner
            return
        with self._control_lock:
            lifeline, self._lifeline = self._lifeline, -1
            if self._control is not None:
                self._control.close()
        try:
            self._process.terminate()
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            _cut(lifeline)
            self._reader.join(timeout=1.0)
            shutil.rmtree(self._directory, ignore_errors=True)


def _cut(lifeline: int) -> None:
    _lifelines.discard(lifeline)
    os.close(lifeline)


def _cut_all() -> None:
    for lifeline in list(_lifelines):
        _cut(lifeline)


os.register_at_fork(after_in_child=_cut_all)


def short_private_directory(prefix: str = "nanovllm-") -> Path:
    """A new directory, mode 0700, with a path short enough for sockets in it."""
    for base in (tempfile.gettempdir(), "/tmp"):
        directory = tempfile.mkdtemp(prefix=prefix, dir=base)
        if len(os.fsencode(directory)) + len("/scheduler-63.sock") <= LONGEST_IPC_PATH:
            return Path(directory)
        os.rmdir(directory)
    raise OSError(f"no temporary directory has a path short enough for sockets: {directory}")


def _pass_on(output: IO[str], last_lines: collections.deque[str]) -> None:
    """Copies the launcher's stderr to this program's, except for the launcher's last line."""
    with output:
        for line in output:
            last_lines.append(line.rstrip("\n"))
            if not line.startswith(_LAST_WORD):
                with contextlib.suppress(ValueError, OSError):  # this program's stderr is closed
                    sys.stderr.write(line)
