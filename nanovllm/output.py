"""Output that never blocks: lines that the reader does not take in time are lost, and counted."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import select
from typing import TYPE_CHECKING, TextIO

from nanovllm.wording import counted

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

PIPE_BYTES = 1 << 20


def output_pipe() -> tuple[int, int]:
    """The read end and the write end of a pipe that holds PIPE_BYTES, where the system grants as
    much. Neither end blocks."""
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    with contextlib.suppress(PermissionError):
        fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return ends


def lossy(stream: TextIO, descriptor: int | None = None) -> TextIO:
    """A stream like `stream`, which writes to `descriptor` (the stream's own, unless given) and
    loses what does not fit where that one does not block."""
    shown_at = stream.fileno()
    raw = LossyOutput(shown_at if descriptor is None else descriptor, shown_at)
    return io.TextIOWrapper(
        raw,  # type: ignore[type-var]
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=True,
        write_through=True,
    )


class LossyOutput(io.RawIOBase):
    """Writes to `descriptor`; says how many lines were lost as soon as there is room again.

    Args:
        shown_at: what `fileno` returns: where people see the output.
    """

    def __init__(self, descriptor: int, shown_at: int) -> None:
        self._descriptor = descriptor
        self._shown_at = shown_at
        self._lost = 0
        self._in_a_line = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._shown_at

    def isatty(self) -> bool:
        return os.isatty(self._shown_at)

    def write(self, data: ReadableBuffer, /) -> int:
        """Takes all of `data`, and never waits for a reader."""
        text = bytes(data)
        rest = self._put(text) if self._tell() else text
        self._lost += rest.count(b"\n")
        return len(text)

    def flush(self) -> None:
        self._tell()

    def _tell(self) -> bool:
        """Says what was lost, if anything; False if there is no room for that."""
        if not self._lost:
            return True
        # A pipe is writable when a whole page is free: there the notice fits, and more.
        if not select.select([], [self._descriptor], [], 0)[1]:
            return False
        notice = f"{counted(self._lost, 'line')} of output lost here: not read in time\n".encode()
        self._put(b"\n" * self._in_a_line + notice)
        self._lost = 0
        return True

    def _put(self, text: bytes) -> bytes:
        """Writes; what did not fit."""
        while text:
            try:
                written = os.write(self._descriptor, text)
            except BlockingIOError:
                break
            self._in_a_line = text[written - 1 : written] != b"\n"
            text = text[written:]
        return text
