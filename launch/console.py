"""The launcher's own stdout and stderr, which nothing in the launcher waits for."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from collections.abc import Iterator

from nanovllm.output import PIPE_BYTES, lossy, output_pipe

# At the end: how long to wait for a reader, a pager or a terminal where somebody pressed Ctrl-S.
LAST_WORDS_S = 1.0


@contextlib.contextmanager
def passed_on() -> Iterator[None]:
    """Meanwhile threads pass on what is written to stdout and stderr. A reader that does not read
    stops these threads, and what does not fit into the pipes to them is lost."""
    stdout, stderr = sys.stdout, sys.stderr
    with _pump(stdout.fileno()) as to_stdout, _pump(stderr.fileno()) as to_stderr:
        sys.stdout, sys.stderr = lossy(stdout, to_stdout), lossy(stderr, to_stderr)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = stdout, stderr


@contextlib.contextmanager
def _pump(to: int) -> Iterator[int]:
    """A descriptor whose input a thread writes to the descriptor `to`."""
    read_end, write_end = output_pipe()
    os.set_blocking(read_end, True)

    def pump() -> None:
        while text := os.read(read_end, PIPE_BYTES):
            with contextlib.suppress(OSError):  # the reader has gone: nobody is there to be told
                _write(to, text)
        os.close(read_end)

    thread = threading.Thread(target=pump, name="console", daemon=True)
    thread.start()
    try:
        yield write_end
    finally:
        os.close(write_end)
        thread.join(LAST_WORDS_S)


def _write(to: int, text: bytes) -> None:
    while text:
        try:
            text = text[os.write(to, text) :]
        except BlockingIOError:  # whoever started the launcher made it so
            select.select([], [to], [])
