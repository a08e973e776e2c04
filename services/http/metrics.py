"""What an HTTP server counts of its requests, and reports to the supervisor."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from typing import Final

from nanovllm.control import Histogram, HttpStats

# Upper bounds of buckets, in seconds.
FIRST_TOKEN_S: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0),
    *(7.5, 10.0, 20.0, 40.0, 80.0),
)
BETWEEN_TOKENS_S: Final = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2),
    *(0.3, 0.5, 1.0, 2.5, 5.0, 10.0),
)
WHOLE_S: Final = (
    *(0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0),
    *(240.0, 480.0),
)
# What always has a number, be it 0; error codes are there once they occur.
REASONS: Final = ("stop", "length", "abort")


class Durations:
    """A histogram that grows."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum_s = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        self._counts[bisect.bisect_left(self._bounds, seconds)] += times
        self._sum_s += seconds * times

    @property
    def histogram(self) -> Histogram:
        return Histogram(self._counts, self._sum_s)


class Recorder:
    """Counts requests of the pipeline: `n` of them for `n` choices."""

    def __init__(self) -> None:
        self._running = 0
        self._finished = Counter(dict.fromkeys(REASONS, 0))
        self._first_token = Durations(FIRST_TOKEN_S)
        self._between_tokens = Durations(BETWEEN_TOKENS_S)
        self._whole = Durations(WHOLE_S)

    def began(self) -> None:
        """A request was submitted."""
        self._running += 1

    def output(self, seconds: float, tokens: int, first: bool) -> None:
        """A stream has output of so many tokens, `seconds` after it last had, or (`first`) after
        the request came."""
        if first:
            self._first_token.add(seconds)
        elif tokens:
            self._between_tokens.add(seconds / tokens, tokens)

    def ended(self, reason: str, seconds: float) -> None:
        """A request has ended, `seconds` after it came.

        Args:
            reason: "stop", "length", "abort" (the client has gone), or the code of an error.
        """
        self._running -= 1
        self._finished[reason] += 1
        self._whole.add(seconds)

    def stats(self) -> HttpStats:
        return HttpStats(
            running=self._running,
            finished=dict(self._finished),
            first_token=self._first_token.histogram,
            between_tokens=self._between_tokens.histogram,
            whole=self._whole.histogram,
        )
