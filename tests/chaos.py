"""Does anything get lost? Services are killed at random while many requests stream.

    python -m tests.chaos --kills 30
    python -m tests.chaos --kills 20 --streams 100 --http

At any time so many requests are unfinished, greedy and seeded, texts and chats, some with stop
strings, emoji in many, a third with penalties, logit_bias, min_tokens, bad_words, prompt_logprobs
and the like, over HTTP with n too. Every one to three seconds a service gets SIGKILL, sometimes two
at once, and now and then one gets SIGSTOP: it goes on after a while, or the supervisor must find
it. Each stream must bring what the same request brings undisturbed. Prints one JSON line:

    kills        by SIGKILL, for each service and rank
    stops        by SIGSTOP: those that were continued, and those that were left to be found
    streams      that ended, and how many of them lived through a kill
    chats        over HTTP: how many answers have content, reasoning and a tool call
    changed      streams whose tokens, text, reason or usage differ from the undisturbed ones
    recovery_s   from a kill until all streams of that moment have gone on: median and maximum

What is left behind, or does not end, is an error.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import click
import psutil
from tqdm import tqdm

from benchmarks.support.help import help_of
from benchmarks.support.pipeline import Pipeline
from nanovllm.names import ServiceId
from tests.pipeline.leftovers import wait_until_nothing_is_left
from tests.recovery.streams import (
    STOPS,
    Outcome,
    Streamed,
    Streams,
    living,
    random_cases,
    undisturbed,
    wait_until_ready,
)

TIMEOUT_S = 180.0
# What was on its way to the client when a service was killed still arrives.
ON_THE_WAY_S = 0.1
TWO_AT_ONCE = 0.2
# One SIGSTOP for so many kills. Every other one is continued after a while.
KILLS_A_STOP = 10
CONTINUED_AFTER_S = (0.5, 8.0)
LEFT_TO_BE_FOUND = float("inf")

DEVICES = {
    "sim": ("--device", "sim", "--sim-step-ms", "40"),
    "cpu": ("--device", "cpu", "--max-model-len", "512", "--num-kvcache-blocks", "2048"),
    "cuda": ("--device", "cuda", "--dtype", "float32", "--max-model-len", "512"),
}


class Blow(NamedTuple):
    """What happens to services at one moment.

    Attributes:
        victims: they are killed; or stopped, if there is a `stop_s`.
        stop_s: after how long a stopped one goes on, or LEFT_TO_BE_FOUND.
    """

    victims: list[ServiceId]
    stop_s: float | None = None


@click.command(help=help_of(__doc__))
@click.option("--kills", type=click.IntRange(1), default=30, show_default=True)
@click.option("--streams", type=click.IntRange(1), default=200, show_default=True)
@click.option("--device", type=click.Choice(list(DEVICES)), default="cpu", show_default=True)
@click.option("--tp", type=click.IntRange(1, 8), default=2, show_default=True)
@click.option("--engines", type=click.IntRange(1, 8), default=1, show_default=True)
@click.option("--seed", type=int, help="Of requests and kills; a random one if not given.")
@click.option("--http", is_flag=True, help="Ask over HTTP, by the openai package.")
def main(
    kills: int, streams: int, device: str, tp: int, engines: int, seed: int | None, http: bool
) -> None:
    seed = random.randrange(2**31) if seed is None else seed
    click.echo(f"seed {seed}", err=True)
    figures = wreak_havoc(kills, streams, device, tp, seed, http=http, engines=engines)
    click.echo(json.dumps(figures))
    sys.exit(1 if figures["changed"] else 0)


def wreak_havoc(
    kills: int,
    streams: int,
    device: str,
    tp: int,
    seed: int,
    pauses_s: tuple[float, float] = (1.0, 3.0),
    http: bool = False,
    engines: int = 1,
) -> dict[str, Any]:
    """One run in a pipeline of its own; what it found, as in the module's text.

    Raises:
        TimeoutError: streams do not end, or a service goes on holding something.
        RequestError: a stream failed.
    """
    draw = random.Random(seed)
    cases = random_cases(draw, streams, STOPS[device])
    arguments = (*DEVICES[device], "--tp", str(tp), "--tokenizers", "2", "--detokenizers", "2")
    arguments += ("--engines", str(engines))
    arguments += ("--http", "127.0.0.1:0") if http else ()
    with Pipeline("", *arguments, "--kvcache-block-size", "16") as pipeline:
        endpoint = pipeline.status().http if http else pipeline.endpoint
        try:
            expected = undisturbed(endpoint, cases)
            load = Streams(endpoint, cases)
            load.wait_for_news()
            start = time.monotonic()
            struck = _strike(pipeline, list(_blows(draw, kills, tp, engines)), pauses_s, draw)
            ended = load.finish(TIMEOUT_S)
            seconds = time.monotonic() - start
            wait_until_nothing_is_left(pipeline)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        changed = [one for one in ended if one.outcome != expected[one.case]]
        for one in changed:
            click.echo(_difference(one, expected[one.case]), err=True)
    chats = {}
    if http:
        # A machine without the openai package can do without HTTP, too.
        from tests.recovery.http_streams import chat_parts

        chats = {"chats": chat_parts(expected)}
    return {
        "device": device,
        "tp": tp,
        "engines": engines,
        "seed": seed,
        "seconds": round(seconds, 1),
        **_kills_and_stops(struck),
        "streams": {
            "at_once": streams,
            "ended": len(ended),
            "hit": sum(any(_lived_at(one, at) for at, _ in struck) for one in ended),
        },
        **chats,
        "changed": len(changed),
        "recovery_s": _recoveries(struck, ended),
    }


def _blows(draw: random.Random, kills: int, tp: int, engines: int) -> Iterator[Blow]:
    """Every service and rank is killed as often as any other, or once more; in any order."""
    services = [ServiceId("ingress")]
    for engine in range(engines):
        services.append(ServiceId("scheduler", 0, engine))
        services += [ServiceId("gpu_worker", rank, engine) for rank in range(tp)]
    services += [ServiceId(role, i) for role in ("tokenizer", "detokenizer") for i in range(2)]
    whole_rounds, rest = divmod(kills, len(services))
    victims = services * whole_rounds + draw.sample(services, rest)
    draw.shuffle(victims)
    until_stop = KILLS_A_STOP // 2
    left = False
    while victims:
        together = [victims.pop()]
        if victims and victims[-1] not in together and draw.random() < TWO_AT_ONCE:
            together.append(victims.pop())
        yield Blow(together)
        until_stop -= len(together)
        if until_stop <= 0:
            until_stop += KILLS_A_STOP
            stop_s = LEFT_TO_BE_FOUND if left else draw.uniform(*CONTINUED_AFTER_S)
            yield Blow([draw.choice(services)], stop_s)
            left = not left


def _strike(
    pipeline: Pipeline, blows: Sequence[Blow], pauses_s: tuple[float, float], draw: random.Random
) -> list[tuple[float, Blow]]:
    """One blow after the other, with pauses; when each fell."""
    struck: list[tuple[float, Blow]] = []
    for blow in tqdm(blows, desc="blows", disable=None, leave=False):
        time.sleep(draw.uniform(*pauses_s))
        if blow.stop_s is not None:  # a start may take a minute until it is taken for hung
            wait_until_ready(pipeline, blow.victims)
        victims = living(pipeline, blow.victims)
        struck.append((time.monotonic(), blow))
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):  # it is dying already
                _hit(victim, blow.stop_s)
    return struck


def _hit(victim: psutil.Process, stop_s: float | None) -> None:
    if stop_s is None:
        victim.kill()
        return
    victim.suspend()
    if stop_s != LEFT_TO_BE_FOUND:
        threading.Timer(stop_s, _go_on, [victim]).start()


def _go_on(victim: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # it may have been killed meanwhile
        victim.resume()


def _kills_and_stops(struck: Sequence[tuple[float, Blow]]) -> dict[str, Any]:
    kills: collections.Counter[str] = collections.Counter()
    stops = {"continued": 0, "to_be_found": 0}
    for _, (victims, stop_s) in struck:
        if stop_s is None:
            kills.update(str(victim) for victim in victims)
        else:
            stops["to_be_found" if stop_s == LEFT_TO_BE_FOUND else "continued"] += 1
    return {"kills": dict(sorted(kills.items())), "stops": stops}


def _recoveries(
    struck: Sequence[tuple[float, Blow]], ended: Sequence[Streamed]
) -> dict[str, dict[str, float]]:
    """Of each service; a blow to two counts for both."""
    found: dict[str, list[float]] = {}
    for at, blow in struck:
        if blow.stop_s is None:
            seconds = max(_next_sign(one, at) - at for one in ended if _lived_at(one, at))
            for role in {victim.role for victim in blow.victims}:
                found.setdefault(role, []).append(seconds)
    return {
        role: {"median": round(statistics.median(times), 2), "max": round(max(times), 2)}
        for role, times in sorted(found.items())
    }


def _lived_at(one: Streamed, at: float) -> bool:
    return one.times[0] < at < one.times[-1]


def _next_sign(one: Streamed, at: float) -> float:
    """When the stream had gone on after a kill; its end is one."""
    return next((time for time in one.times if time > at + ON_THE_WAY_S), one.times[-1])


def _difference(one: Streamed, expected: Outcome) -> str:
    """Where a stream first differs from what it brings undisturbed."""
    pairs = zip(one.outcome.token_ids, expected.token_ids, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return f"case {one.case} differs from token {same} on:\n  {one.outcome}\n  {expected}"


if __name__ == "__main__":
    main()
