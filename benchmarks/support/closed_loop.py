"""A load that never ends: as one request finishes, the next begins."""

from __future__ import annotations

import bisect
import itertools
import random
import time
from typing import Any

from benchmarks.support.raw_client import RawClient
from nanovllm.protocol import Delta, Error, Finish, Generate, Sampling

# The simulated device stamps a logged token with the time its step ended: minus the logprob is
# the machine's monotonic clock in µs, modulo this.
STAMP_MODULO = 1 << 24


class ClosedLoop:
    """Keeps `outstanding` requests unfinished at one ingress, and notes when tokens arrive.

    Args:
        endpoint: the ingress.
        outstanding: how many requests are unfinished at any time.
        output_tokens: shortest and longest output.
        probe_every: each so-many-th request asks for logprobs, which carry the device's stamps.
        seed: of the lengths and prompts.
    """

    def __init__(
        self,
        endpoint: str,
        outstanding: int,
        output_tokens: tuple[int, int],
        probe_every: int,
        seed: int = 0,
    ) -> None:
        self._client = RawClient(endpoint, RCVHWM=0)
        self._outstanding = outstanding
        self._output_tokens = output_tokens
        self._probe_every = probe_every
        self._random = random.Random(seed)
        self._ids = itertools.count()
        self._arrived_at: list[float] = [0.0]
        self._arrived: list[int] = [0]
        self.finished = 0
        self.lags_s: list[float] = []

    def run_until(self, deadline: float) -> None:
        """Drives the load until `time.monotonic()` reaches `deadline`.

        Raises:
            RuntimeError: when a request fails.
        """
        if self._arrived_at == [0.0]:
            self._arrived_at = [time.monotonic()]
            self._send(self._outstanding)
        while (left := deadline - time.monotonic()) > 0:
            if messages := self._client.receive(left):
                self._take(messages)

    def received_between(self, start: float, end: float) -> float:
        """Tokens that arrived between two times of `time.monotonic()`."""
        return self._at(end) - self._at(start)

    def close(self) -> None:
        """Disconnects, which aborts what is unfinished."""
        self._client.close()

    def _take(self, messages: list[Any]) -> None:
        now = time.monotonic()
        tokens = ended = 0
        for message in messages:
            if isinstance(message, Delta):
                tokens += len(message.token_ids)
                if message.logprobs:
                    self._note_lags(message.logprobs, now)
            elif isinstance(message, Finish):
                ended += 1
            elif isinstance(message, Error):
                raise RuntimeError(f"{message.id}: {message.code}: {message.message}")
        self._arrived_at.append(now)
        self._arrived.append(self._arrived[-1] + tokens)
        if ended:
            self.finished += ended
            self._send(ended)

    def _note_lags(self, logprobs: list[list[tuple[int, float]]], now: float) -> None:
        micros = int(now * 1e6)
        for entry in logprobs:
            self.lags_s.append((micros + round(entry[0][1])) % STAMP_MODULO / 1e6)

    def _send(self, count: int) -> None:
        for number in itertools.islice(self._ids, count):
            probed = number % self._probe_every == 0
            sampling = Sampling(
                max_tokens=self._random.randint(*self._output_tokens),
                ignore_eos=True,
                seed=number,
                logprobs=0 if probed else None,
            )
            prompt = [self._random.randrange(5, 250) for _ in range(16)]
            self._client.say(Generate(id=str(number), prompt_token_ids=prompt, sampling=sampling))

    def _at(self, when: float) -> float:
        """Tokens that had arrived by `when`."""
        return float(self._arrived[bisect.bisect_right(self._arrived_at, when) - 1])
