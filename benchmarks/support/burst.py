"""Requests that are sent at once, and when each of their tokens arrived."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import click

from benchmarks.support.raw_client import RawClient
from nanovllm.protocol import Delta, Error, Finish, Generate, Sampling

# A burst that hears nothing for so long has been forgotten.
SILENCE_S = 60.0


class Burst:
    """One client of the ingress at `endpoint`.

    Attributes:
        arrivals: of each request, by its id, when its deltas came (`time.monotonic`, in seconds)
            and how many tokens each brought.
        unfinished: ids of requests.
    """

    def __init__(self, endpoint: str) -> None:
        self._client = RawClient(endpoint, RCVHWM=0)
        self.arrivals: dict[str, list[tuple[float, int]]] = {}
        self.unfinished: set[str] = set()

    def send(self, prompts: Iterable[list[int]], sampling: Sampling) -> list[str]:
        """Sends a request for each prompt; returns their ids."""
        requests = [
            Generate(id=str(number), prompt_token_ids=prompt, sampling=sampling)
            for number, prompt in enumerate(prompts, len(self.arrivals))
        ]
        for request in requests:
            self.arrivals[request.id] = []
            self.unfinished.add(request.id)
        self._client.say(*requests)
        return [request.id for request in requests]

    def run_until(self, reached: Callable[[], bool]) -> None:
        """Takes what comes until `reached()`.

        Raises RuntimeError when a request fails, or nothing comes any more; ClickException when
        there is nothing to wait for.
        """
        while not reached():
            if not self.unfinished:
                raise click.ClickException("all answers ended before they were measured")
            messages = self._client.receive(SILENCE_S)
            if not messages:
                raise RuntimeError(f"no token for {SILENCE_S:g} s")
            self._take(messages)

    def run_for(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self.run_until(lambda: time.monotonic() >= deadline)

    def tokens_until(self, when: float) -> int:
        """How many tokens had arrived by then, of all requests."""
        return sum(n for came in self.arrivals.values() for at, n in came if at <= when)

    def close(self) -> None:
        """Disconnects, which aborts what is unfinished."""
        self._client.close()

    def _take(self, messages: list[Any]) -> None:
        now = time.monotonic()
        for message in messages:
            if isinstance(message, Delta) and message.token_ids:
                self.arrivals[message.id].append((now, len(message.token_ids)))
            elif isinstance(message, Finish):
                self.unfinished.discard(message.id)
            elif isinstance(message, Error):
                raise RuntimeError(f"{message.id}: {message.code}: {message.message}")
