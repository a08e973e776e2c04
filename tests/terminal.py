"""A program in a terminal of its own: what it shows is read, and keys are pressed."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

TIMEOUT_S = 60.0
ENTER = "\r"
ALT_ENTER = "\x1b\r"
UP = "\x1b[A"
CTRL_C = "\x03"
CTRL_D = "\x04"
ROWS, COLUMNS = 24, 100
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*\x07|[=>])")


# Lets rich draw a bar where there is no terminal.
BAR_IS_DRAWN = {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "120"}


def shown(written: str) -> str:
    """What was written, without colours and movements of the cursor."""
    return _ESCAPES.sub("", written)


class Terminal:
    """A pseudo-terminal and the program in it.

    Attributes:
        raw: all that the program has written.
    """

    def __init__(self, command: Sequence[str], **environment: str) -> None:
        self._mine, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        # Nothing here answers a question for the cursor's position.
        self.program = subprocess.Popen(
            command,
            stdin=its,
            stdout=its,
            stderr=its,
            env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **environment},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(its)
        self.raw = ""
        self._seen = 0

    def press(self, keys: str) -> None:
        os.write(self._mine, keys.encode())

    def paste(self, text: str) -> None:
        """As a terminal does that marks where a paste begins and ends."""
        self.press(f"\x1b[200~{text}\x1b[201~")

    def wait_for(self, text: str) -> str:
        """What is shown, without colours, until the next `text`; raises TimeoutError."""
        deadline = time.monotonic() + TIMEOUT_S
        while (at := self.shown.find(text, self._seen)) < 0:
            if not select.select([self._mine], [], [], deadline - time.monotonic())[0]:
                raise TimeoutError(f"no {text!r} in {self.shown[self._seen :]!r}")
            try:
                self.raw += os.read(self._mine, 4096).decode(errors="replace")
            except OSError:  # the program has ended
                raise AssertionError(f"no {text!r} in {self.shown[self._seen :]!r}") from None
        before, self._seen = self.shown[self._seen : at], at + len(text)
        return before

    def wait(self) -> int:
        """Waits for the program's end, and reads the rest; the exit code."""
        with open(os.dup(self._mine), "rb", buffering=0) as rest:
            try:
                while more := rest.read(4096):
                    self.raw += more.decode(errors="replace")
            except OSError:
                pass
        return self.program.wait(TIMEOUT_S)

    @property
    def shown(self) -> str:
        return shown(self.raw).replace("\r\n", "\n")

    def close(self) -> None:
        if self.program.poll() is None:
            os.killpg(self.program.pid, signal.SIGKILL)
            self.program.wait()
        os.close(self._mine)


@contextmanager
def terminal(command: Sequence[str], **environment: str) -> Iterator[Terminal]:
    started = Terminal(command, **environment)
    try:
        yield started
    finally:
        started.close()
