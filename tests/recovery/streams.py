"""Streams that never pause: requests that start anew as others end, while services are killed.

What the tests of recovery share with `tests.chaos` and `tests.recovery`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import psutil

from benchmarks.support.pipeline import LOOK_AGAIN_S, Pipeline
from nanovllm import AsyncClient, SamplingParams
from nanovllm.client.control import Control
from nanovllm.client.requests import Prompt
from nanovllm.control import SchedulerStats
from nanovllm.names import ServiceId
from nanovllm.protocol import PromptLogprobs

TIMEOUT_S = 120.0
NEW_TOKENS = 120
PAUSE_S = 2.0
PROMPTS = ("Once upon a time", "🦊🐻 Once", "Zoë", "A lighthouse keeper")
# Over HTTP the demo model calls a tool for the first.
QUESTIONS = ("What is the weather in Bern?", "Tell me a story about a fox.")
# Strings in what each device writes. In float32 the demo model writes the same on both.
MODEL_STOPS = (" lantern", "kettle", ". T")
STOPS = {"sim": ("ree", "old "), "cpu": MODEL_STOPS, "cuda": MODEL_STOPS}


class Case(NamedTuple):
    """What is asked; with `leaves_after`, by a client that wants no more than so many tokens, and
    then aborts."""

    prompt: Prompt
    params: SamplingParams
    leaves_after: int | None = None


class Outcome(NamedTuple):
    """What a client has at the end of a stream, joined from its deltas.

    Attributes:
        prompt: if `prompt_logprobs` were asked for, the prompt's tokens that they are of.
    """

    token_ids: list[int]
    text: str
    finish_reason: str
    completion_tokens: int
    prompt: tuple[int, ...] = ()


class Streamed(NamedTuple):
    """One stream that has ended.

    Attributes:
        case: the number of what was asked.
        times: when it was asked, when each delta came, and when its end did; `time.monotonic`.
    """

    case: int
    outcome: Outcome
    times: list[float]


# Most end by `max_tokens`, some before.
GRAMMARS: list[dict[str, Any]] = [
    {"json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 20}},
    {"regex": "([A-Z][a-z]* ){1,40}[.!?]"},
    {"json_object": True},
    {"grammar": 'start: line{3,}\nline: /[0-9]+/ ": " WORDS "\\n"\nWORDS: /[ -~]{1,60}/'},
]

# Asks the case of a number, and tells of news.
Ask = Callable[[int, Case, threading.Event], Awaitable[Streamed]]


def mixed_cases(stops: Sequence[str]) -> list[Case]:
    """Greedy and seeded, long and short, with and without stop strings and grammars."""
    cases = []
    for number in range(12):
        temperature = (0.0, 1.0, 1.5)[number % 3]
        params = SamplingParams(
            temperature=temperature,
            max_tokens=NEW_TOKENS - 7 * number,
            ignore_eos=number % 3 != 1,
            seed=number,
            stop=list(stops) if number % 2 else [],
            structured_outputs=GRAMMARS[number % len(GRAMMARS)] if number % 3 == 1 else None,
        )
        cases.append(Case(PROMPTS[number % len(PROMPTS)], params))
    return cases


def random_cases(draw: random.Random, count: int, stops: Sequence[str]) -> list[Case]:
    """Of every kind: text and (every other) chats, greedy and seeded, with filters, stop strings
    and logprobs. One in ten is aborted. One in four asks for a tool; of the others one in three has
    a grammar, and one in three has further parameters."""
    cases = []
    for number in range(count):
        prompt: Prompt = " ".join(draw.choices(PROMPTS, k=draw.randint(1, 12)))
        max_tokens = draw.randint(20, 120)
        asks_for_a_tool = number % 4 == 1
        if number % 2:
            question = QUESTIONS[0 if asks_for_a_tool else 1]
            prompt = [{"role": "user", "content": question}]
            max_tokens += 40  # the model thinks first
        kind = "plain" if asks_for_a_tool else draw.choice(("plain", "grammar", "further"))
        params = SamplingParams(
            temperature=draw.choice((0.0, 1.0, 1.5)),
            top_p=draw.choice((1.0, 0.9)),
            max_tokens=max_tokens,
            ignore_eos=kind != "grammar" and draw.random() < 0.75,
            seed=draw.getrandbits(32),
            stop=list(stops) if draw.random() < 0.4 else [],
            logprobs=draw.choice((None, None, None, 2)),
            **(further_params(draw, max_tokens) if kind == "further" else {}),
            structured_outputs=draw.choice(GRAMMARS) if kind == "grammar" else None,
        )
        leaves_after = draw.randint(1, max_tokens) if draw.random() < 0.1 else None
        cases.append(Case(prompt, params, leaves_after))
    return cases


def further_params(draw: random.Random, max_tokens: int) -> dict[str, Any]:
    """Two to four of the parameters that change logits, text or what is told."""
    tokens = range(260, 900)  # of the demo model: no special ones
    params = {
        "repetition_penalty": draw.choice((1.1, 1.5)),
        "frequency_penalty": draw.choice((-0.5, 0.5, 1.0)),
        "presence_penalty": draw.choice((-0.5, 0.5, 1.0)),
        "logit_bias": {token: draw.uniform(-5, 5) for token in draw.sample(tokens, 20)},
        "min_tokens": draw.randint(1, max_tokens),
        "bad_words": ["the", " fox", *([token] for token in draw.sample(tokens, 10))],
        "allowed_token_ids": draw.sample(tokens, 400),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "prompt_logprobs": draw.randint(0, 5),
        "n": draw.randint(2, 3),
    }
    return dict(draw.sample(sorted(params.items()), draw.randint(2, 4)))


async def stream(client: AsyncClient, number: int, case: Case, news: threading.Event) -> Streamed:
    tokens: list[int] = []
    chosen: list[int] = []
    text: list[str] = []
    told: list[PromptLogprobs] = []
    times = [time.monotonic()]
    # Only HTTP has `n`.
    deltas = client.generate(case.prompt, dataclasses.replace(case.params, n=1), stream=True)
    async for delta in deltas:
        tokens += delta.token_ids
        chosen += [entry[0][0] for entry in delta.logprobs or ()]
        text.append(delta.text)
        told += [] if delta.prompt_logprobs is None else [delta.prompt_logprobs]
        times.append(time.monotonic())
        news.set()
        if case.leaves_after is not None and len(tokens) >= case.leaves_after:
            deltas.close()
            outcome = Outcome(tokens[: case.leaves_after], "", "left", case.leaves_after)
            return Streamed(number, outcome, times)
    end = await deltas.result()
    times.append(time.monotonic())
    news.set()
    if case.params.logprobs is not None and chosen != tokens:
        raise RuntimeError(f"{case}: logprobs are of the tokens {chosen}, and there are {tokens}")
    outcome = Outcome(tokens, "".join(text), end.finish_reason, end.usage.completion_tokens)
    if case.params.prompt_logprobs is not None:
        (entries,) = told  # once
        outcome = outcome._replace(prompt=tuple(entry[0][0] for entry in entries if entry))
    return Streamed(number, outcome, times)


class Streams:
    """One stream of each case at any time, in a thread, until `finish`.

    Args:
        endpoint: the pipeline, or the URL of its HTTP servers.
        cases: what is asked.
        rounds: how often each case is asked at least.

    Attributes:
        ended: all streams that have ended.
    """

    def __init__(self, endpoint: str, cases: Sequence[Case], rounds: int = 1) -> None:
        self.ended: list[Streamed] = []
        self._endpoint = endpoint
        self._cases = cases
        self._rounds = rounds
        self._news = [threading.Event() for _ in cases]
        self._enough = threading.Event()
        self._pauses = False
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

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """In this context a stream waits PAUSE_S before it starts anew: a test that waits for
        something else for seconds needs no busy cores."""
        self._pauses = True
        try:
            yield
        finally:
            self._pauses = False

    def finish(self, timeout_s: float = TIMEOUT_S) -> list[Streamed]:
        """Starts no new streams; all that there were, once the last has ended.

        Raises TimeoutError if one does not end.
        """
        self._enough.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError("streams do not end")
        if self._failure is not None:
            raise self._failure
        return self.ended

    def _run(self) -> None:
        try:
            asyncio.run(self._all())
        except BaseException as failure:
            self._failure = failure
            for news in self._news:
                news.set()

    async def _all(self) -> None:
        if self._endpoint.startswith("http"):
            from tests.recovery.http_streams import http_client, stream_over_http

            async with http_client(self._endpoint) as over_http:
                await self._every_case(partial(stream_over_http, over_http))
        else:
            async with AsyncClient(self._endpoint, timeout=TIMEOUT_S) as client:
                await self._every_case(partial(stream, client))

    async def _every_case(self, ask: Ask) -> None:
        await asyncio.gather(*(self._again_and_again(ask, i) for i in range(len(self._news))))

    async def _again_and_again(self, ask: Ask, number: int) -> None:
        done = 0
        while done < self._rounds or not self._enough.is_set():
            self.ended.append(await ask(number, self._cases[number], self._news[number]))
            done += 1
            over = time.monotonic() + PAUSE_S
            while self._pauses and time.monotonic() < over:
                await asyncio.sleep(LOOK_AGAIN_S)


def undisturbed(endpoint: str, cases: Sequence[Case]) -> list[Outcome]:
    """The outcome of each case while nothing is killed."""
    ended = Streams(endpoint, cases).finish()
    return [one.outcome for one in sorted(ended, key=lambda one: one.case)]


def services(pipeline: Pipeline) -> dict[ServiceId, psutil.Process]:
    """The processes that live now."""
    found: dict[ServiceId, psutil.Process] = {}
    for child in psutil.Process(pipeline.process.pid).children():
        try:
            command: list[str] = child.cmdline()
            dead = child.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            continue
        role = [word.split(".")[-1] for word in command if ".services." in word]
        if role and not dead:
            index, engine = (
                int(command[command.index(option) + 1]) for option in ("--index", "--engine")
            )
            found[ServiceId(role[0], index, engine)] = child
    return found


def living(pipeline: Pipeline, service_ids: Sequence[ServiceId]) -> list[psutil.Process]:
    """The processes of these services, as soon as each has one."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        alive = services(pipeline)
        if all(service_id in alive for service_id in service_ids):
            return [alive[service_id] for service_id in service_ids]
        if time.monotonic() > deadline:
            raise TimeoutError(f"{service_ids} are not there:\n{pipeline.transcript}")
        time.sleep(LOOK_AGAIN_S)


def wait_until_ready(pipeline: Pipeline, service_ids: Sequence[ServiceId]) -> None:
    """Returns when these services are alive and have said that they are ready."""
    deadline = time.monotonic() + TIMEOUT_S
    with Control(str(pipeline.runtime_dir)) as control:
        while True:
            states = {s.service: s.state for s in control.status().services}
            if all(states.get(service_id) == "ready" for service_id in service_ids):
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{states}:\n{pipeline.transcript}")
            time.sleep(LOOK_AGAIN_S)


def kill(pipeline: Pipeline, *service_ids: ServiceId) -> None:
    """SIGKILL, as soon as there is a process to kill."""
    for victim in living(pipeline, service_ids):
        victim.kill()


def wait_for_another(pipeline: Pipeline, service_id: ServiceId, before: psutil.Process) -> None:
    """Returns when another process than `before` is this service."""
    deadline = time.monotonic() + TIMEOUT_S
    while services(pipeline).get(service_id, before).pid == before.pid:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{service_id} does not come back:\n{pipeline.transcript}")
        time.sleep(LOOK_AGAIN_S)


def check(ended: Sequence[Streamed], expected: Sequence[Outcome], pipeline: Pipeline) -> None:
    """Fails unless every stream equals the undisturbed one and the scheduler holds nothing."""
    for number, outcome, _ in ended:
        assert outcome == expected[number], f"case {number}\n{pipeline.transcript}"
    idle = pipeline.stats_once(SchedulerStats, lambda stats: stats.records == 0)
    assert (idle.running, idle.waiting, idle.blocks_used) == (0, 0, 0)
