"""When conversations are due: a fixed number at a time, at random, or as a trace says.

Times are in seconds since the measurement began. While the load warms up they are negative.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, Protocol

import msgspec

from nanovllm.bench.files import InputFileError, json_lines, read
from nanovllm.bench.work import MAX_LENGTH

Length = Annotated[int, msgspec.Meta(ge=1, le=MAX_LENGTH)]


class Arrivals(Protocol):
    def due_s(self, now_s: float, running: int) -> float:
        """When the next conversation is due: perhaps in the past; infinity if none is until one of
        the `running` ones has ended."""

    def started(self) -> None:
        """The next conversation has been started."""


class Concurrency(NamedTuple):
    """As a conversation ends, the next one begins (a closed loop)."""

    conversations: int

    def due_s(self, now_s: float, running: int) -> float:
        return now_s if running < self.conversations else math.inf

    def started(self) -> None:
        pass


class Poisson:
    """A Poisson process, whatever the server does (an open loop).

    Args:
        rate: conversations a second, on average.
        start_s: when the process starts.
    """

    def __init__(self, rate: float, start_s: float, seed: int) -> None:
        self._rate = rate
        self._random = random.Random(seed)
        self._due_s = start_s + self._random.expovariate(rate)

    def due_s(self, now_s: float, running: int) -> float:
        return self._due_s

    def started(self) -> None:
        self._due_s += self._random.expovariate(self._rate)


class Arrival(NamedTuple):
    """One line of a trace. The lengths, in tokens, are None where the trace has none."""

    at_s: float
    input: int | None = None
    output: int | None = None


class Trace:
    """Arrivals at given times, whatever the server does (an open loop).

    Args:
        arrivals: in order of time.
        start_s: when the trace's second 0 is.
    """

    def __init__(self, arrivals: Sequence[Arrival], start_s: float) -> None:
        self._due_s = [start_s + arrival.at_s for arrival in reversed(arrivals)]

    def due_s(self, now_s: float, running: int) -> float:
        return self._due_s[-1] if self._due_s else math.inf

    def started(self) -> None:
        self._due_s.pop()


class _Line(msgspec.Struct):
    at_s: Annotated[float, msgspec.Meta(ge=0)] | None = None
    timestamp: float | None = None
    input: Length | None = None
    output: Length | None = None


def read_trace(path: Path) -> list[Arrival]:
    """The arrivals in a file of JSON lines, in order of time.

    A line has `at_s`, seconds since the start, or `timestamp`, seconds since any time: of time
    stamps, the first is second 0. `input` and `output` are lengths in tokens.

    Raises:
        InputFileError: the file cannot be read, or a line is not valid.
    """
    lines = list(json_lines(read(path), _Line, path))
    stamps = [line.timestamp for _, line in lines if line.timestamp is not None]
    first = min(stamps, default=0.0)
    arrivals = []
    for number, line in lines:
        if line.at_s is not None:
            at_s = line.at_s
        elif line.timestamp is not None:
            at_s = line.timestamp - first
        else:
            raise InputFileError(f"{path}, line {number}: there is neither at_s nor timestamp")
        arrivals.append(Arrival(at_s, line.input, line.output))
    if not arrivals:
        raise InputFileError(f"{path} has no arrival")
    return sorted(arrivals, key=lambda arrival: arrival.at_s)
