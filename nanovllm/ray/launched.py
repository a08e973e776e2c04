"""A launcher as a child process of an actor, in a private directory with its keys."""

from __future__ import annotations

import collections
import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

from nanovllm.client.private_pipeline import short_private_directory
from nanovllm.log import Event, event_of, render
from nanovllm.ray.plan import Launch

# Of the names of private directories.
PREFIX: Final = "nanovllm-ray-"
LAST_LINES: Final = 20
# From one look at what should run to the next, and from the end of a launcher to its next start.
LOOK_AGAIN_S: Final = 1.0
# Between SIGTERM and SIGKILL, beside the time that requests have to finish.
GRACE_S: Final = 15.0
_LAST_WORD: Final = "nanovllm-launch: "


class Launched:
    """A launcher that runs, and ends with this process.

    Attributes:
        runtime_dir: the private directory.
        said: its latest line that says that its services are ready; empty before.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.said = ""
        self._last_lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self.runtime_dir = short_private_directory(PREFIX)
        try:
            for name, content in launch.secrets.files.items():
                _write(self.runtime_dir / name, content)
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "nanovllm.ray.launcher", str(self.runtime_dir)),
                    *launch.arguments(self.runtime_dir),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={**os.environ, **launch.secrets.environment, "PYTHONUNBUFFERED": "1"},
                process_group=0,
            )
        except BaseException:
            shutil.rmtree(self.runtime_dir, ignore_errors=True)
            raise
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,))
        self._reader.start()

    def ended(self, timeout_s: float) -> bool:
        """Whether it ends within that time by itself; then nothing of it is left."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
            self._close()
        return self._process.returncode is not None

    def end(self, timeout_s: float) -> None:
        """Requests have `timeout_s` seconds to finish, or to move to other engines."""
        self._process.terminate()
        try:
            self._process.wait(timeout_s + GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close()

    def last_words(self) -> str:
        """Why it has ended, as it said; nothing if it was to end, as with its pipeline."""
        if self._process.returncode == 0:
            return ""
        events = [event_of(line, "launcher") for line in self._last_lines]
        if words := [*filter(None, map(_last_word, events))]:
            return words[-1]
        return "\n".join(map(_readable, events)) or f"exit code {self._process.returncode}"

    def _close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._reader.join()
        shutil.rmtree(self.runtime_dir, ignore_errors=True)

    def _read(self, output: IO[str]) -> None:
        """Passes the launcher's output on, to Ray's logs."""
        with output:
            for line in output:
                self._last_lines.append(line.rstrip("\n"))
                if self.launch.says in line:
                    self.said = line
                with contextlib.suppress(OSError):
                    sys.stderr.write(line)


class Keeper:
    """Keeps a launcher running, in a thread, until told to stop.

    Args:
        wanted: returns what should run now; None while that is not known.
        drain_s: what requests have to finish in the end, in seconds.
    """

    def __init__(self, wanted: Callable[[], Launch | None], drain_s: float) -> None:
        self._wanted = wanted
        self._drain_s = drain_s
        self._over = threading.Event()
        self.launched: Launched | None = None
        self.error = ""  # why the latest launcher has ended, until the next is ready
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._thread.start()

    @property
    def said(self) -> str:
        """What the launcher says once its services are ready; empty before."""
        launched = self.launched
        return launched.said if launched is not None else ""

    def stop(self) -> None:
        """Returns when the launcher has ended, and its directory is gone."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            wanted = self._wanted()
            if wanted is not None:
                try:
                    self._keep(wanted)
                except Exception as error:  # such as a full disk: told, and tried again
                    self.error = f"the launcher cannot be started: {error}"
            self._over.wait(LOOK_AGAIN_S)

    def _keep(self, wanted: Launch) -> None:
        """Runs a launcher until it ends, or something else should run."""
        launched = self.launched = Launched(wanted)
        try:
            while not self._over.is_set():
                if launched.ended(LOOK_AGAIN_S):
                    self.error = launched.last_words()
                    return
                if launched.said:
                    self.error = ""
                if self._wanted() not in (wanted, None):
                    launched.end(0.0)
                    return
            launched.end(self._drain_s)
        finally:
            self.launched = None


def _last_word(event: Event) -> str:
    """Why a launcher ends, if this says so; which is a line of its own, or an event of its log."""
    if event.level is None and event.message.startswith(_LAST_WORD):
        return event.message.removeprefix(_LAST_WORD)
    return "\n".join(event.lines) if event.level == "critical" else ""


def _readable(event: Event) -> str:
    return event.message if event.level is None else render(event, "text")


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
        opened.write(content)
