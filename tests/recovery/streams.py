"""Streams that never pause: requests that start anew as others end, while services are killed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import psutil

from nanovllm import AsyncClient, SamplingParams
from tests.pipelines import Pipeline

TIMEOUT_S = 60.0
NEW_TOKENS = 200


class Case(NamedTuple):
    prompt: str
    params: SamplingParams


class Outcome(NamedTuple):
    """What a client has at the end of a stream, joined from its deltas."""

    token_ids: list[int]
    text: str
    finish_reason: str
    completion_tokens: int


def mixed_cases(stops: Sequence[str]) -> list[Case]:
    """Greedy and seeded, long and short, with and without stop strings."""
    prompts = ["Once upon a time", "🦊🐻 Once", "Zoë", "A lighthouse keeper"]
    cases = []
    for number in range(12):
        temperature = (0.0, 1.0, 1.5)[number % 3]
        params = SamplingParams(
            temperature=temperature,
            max_tokens=NEW_TOKENS - 15 * number,
            ignore_eos=True,
            seed=number,
            stop=list(stops) if number % 2 else [],
        )
        cases.append(Case(prompts[number % len(prompts)], params))
    return cases


async def stream(client: AsyncClient, case: Case, on_delta: threading.Event) -> Outcome:
    tokens: list[int] = []
    text: list[str] = []
    deltas = client.generate(case.prompt, case.params, stream=True)
    async for delta in deltas:
        tokens += delta.token_ids
        text.append(delta.text)
        on_delta.set()
    end = await deltas.result()
    on_delta.set()
    return Outcome(tokens, "".join(text), end.finish_reason, end.usage.completion_tokens)


class Streams:
    """One stream of each case at any time, in a thread, until `finish`.

    Args:
        endpoint: the pipeline.
        cases: what is asked.
        rounds: how often each case is asked at least.
    """

    def __init__(self, endpoint: str, cases: Sequence[Case], rounds: int = 1) -> None:
        self.outcomes: list[tuple[int, Outcome]] = []
        self._endpoint = endpoint
        self._cases = cases
        self._rounds = rounds
        self._news = [threading.Event() for _ in cases]
        self._enough = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait_for_news(self) -> None:
        """Returns when every stream has brought something since the call.

        Raises TimeoutError if one does not.
        """
        for news in self._news:
            news.clear()
        deadline = time.monotonic() + TIMEOUT_S
        for case, news in zip(self._cases, self._news, strict=True):
            if not news.wait(deadline - time.monotonic()) or self._failure is not None:
                raise TimeoutError(f"nothing came for {case}") from self._failure

    def finish(self) -> list[tuple[int, Outcome]]:
        """Starts no new streams; the number of the case and the outcome of all that there were."""
        self._enough.set()
        self._thread.join(TIMEOUT_S)
        if self._thread.is_alive():
            raise TimeoutError("streams do not end")
        if self._failure is not None:
            raise self._failure
        return self.outcomes

    def _run(self) -> None:
        try:
            asyncio.run(self._all())
        except BaseException as failure:
            self._failure = failure
            for news in self._news:
                news.set()

    async def _all(self) -> None:
        async with AsyncClient(self._endpoint, timeout=TIMEOUT_S) as client:
            await asyncio.gather(
                *(self._again_and_again(client, i) for i in range(len(self._news)))
            )

    async def _again_and_again(self, client: AsyncClient, number: int) -> None:
        done = 0
        while done < self._rounds or not self._enough.is_set():
            outcome = await stream(client, self._cases[number], self._news[number])
            self.outcomes.append((number, outcome))
            done += 1


def undisturbed(endpoint: str, cases: Sequence[Case]) -> list[Outcome]:
    """The outcome of each case while nothing is killed."""
    streams = Streams(endpoint, cases)
    return [outcome for _, outcome in sorted(streams.finish(), key=lambda pair: pair[0])]


def services(pipeline: Pipeline) -> dict[tuple[str, int], psutil.Process]:
    """The processes that live now, by role and index."""
    if pipeline.process is None:
        raise RuntimeError("not launched")
    found: dict[tuple[str, int], psutil.Process] = {}
    for child in psutil.Process(pipeline.process.pid).children():
        try:
            command: list[str] = child.cmdline()
        except psutil.Error:
            continue
        role = [word.split(".")[-1] for word in command if ".services." in word]
        if role and child.status() != psutil.STATUS_ZOMBIE:
            found[role[0], int(command[command.index("--index") + 1])] = child
    return found


def kill(pipeline: Pipeline, *places: tuple[str, int]) -> None:
    """SIGKILL, as soon as there is a process to kill."""
    deadline = time.monotonic() + TIMEOUT_S
    victims: list[psutil.Process] = []
    while len(victims) < len(places):
        alive = services(pipeline)
        victims = [alive[place] for place in places if place in alive]
        if time.monotonic() > deadline:
            raise TimeoutError(f"{places} are not there:\n{pipeline.transcript}")
    for victim in victims:
        victim.kill()


def check(
    outcomes: Sequence[tuple[int, Outcome]], expected: Sequence[Outcome], pipeline: Pipeline
) -> None:
    """Every stream brought what it brings undisturbed, and nothing is left in the scheduler."""
    for number, outcome in outcomes:
        assert outcome == expected[number], f"case {number}\n{pipeline.transcript}"
    idle = pipeline.scheduler_stats_once(lambda stats: stats.records == 0)
    assert (idle.running, idle.waiting, idle.blocks_used) == (0, 0, 0)
