"""What HTTP costs beside the ingress socket: the whole pipeline on a simulated device.

    python -m benchmarks.http

Loads the socket and the HTTP server in turn, with one generator, and prints a JSON line a round:

    raw, http          output tokens a second that came
    ratio              http over raw
    door_us            CPU time of the HTTP server, a token
    generator_us       CPU time of the generator over HTTP, a token

Then two streams run together, one over each. Their tokens are made in the same steps:

    added_ms           from a token at the socket's client to the one of its step over HTTP
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks.support.help import help_of
from benchmarks.support.load import run_for
from benchmarks.support.pipeline import Pipeline
from nanovllm.bench.arrivals import Concurrency
from nanovllm.bench.client import LoadClient, SocketClient
from nanovllm.bench.http import HttpClient, Url
from nanovllm.bench.load import Load
from nanovllm.bench.prompts import Conversation, Shape, random_conversations
from nanovllm.bench.report import arrived
from nanovllm.bench.work import Lengths
from nanovllm.control import ServiceStatus
from nanovllm.protocol import Sampling

OUTPUT_TOKENS = Lengths(50, 600)
HELLO = [{"role": "user", "content": "Hello."}]
WARM_UP_S = 6.0
# Between two reports of a service.
REPORT_S = 1.0

Connect = Callable[[], AbstractContextManager[LoadClient]]


@click.command(help=help_of(__doc__))
@click.option("--streams", default=500, show_default=True)
@click.option("--step-ms", default=10.0, show_default=True, help="A step of the device.")
@click.option("--seconds", default=12.0, show_default=True, help="Length of each measurement.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--chats", is_flag=True, help="Chats, instead of completions of token ids.")
def main(streams: int, step_ms: float, seconds: float, rounds: int, chats: bool) -> None:
    arguments = (
        f"--device sim --sim-step-ms {step_ms} --max-num-seqs {streams} --max-model-len 1024"
    )
    arguments += " --http 127.0.0.1:0 --log-level warning"
    with Pipeline("", *arguments.split()) as pipeline:
        url = Url.parse(f"http://127.0.0.1:{pipeline.http_port}")

        raw = partial(SocketClient, pipeline.endpoint)
        http = partial(HttpClient, url, "demo", "")
        for _ in range(rounds):
            over_raw = _measure(pipeline, raw, streams, seconds, chats)
            over_http = _measure(pipeline, http, streams, seconds, chats)
            figures = {
                "raw": round(over_raw.rate),
                "http": round(over_http.rate),
                "ratio": round(over_http.rate / over_raw.rate, 3),
                "door_us": round(over_http.door_us, 1),
                "generator_us": round(over_http.generator_us, 1),
            }
            click.echo(json.dumps(figures))
        for _ in range(rounds):
            added_ms = _added_ms(pipeline.endpoint, url, seconds, step_ms, chats)
            click.echo(json.dumps({"added_ms": added_ms}))


class _Figures(NamedTuple):
    rate: float
    door_us: float
    generator_us: float


def _measure(
    pipeline: Pipeline, connect: Connect, streams: int, seconds: float, chats: bool
) -> _Figures:
    with connect() as client:
        load = Load(Concurrency(streams), _conversations(chats, OUTPUT_TOKENS), time.monotonic())
        run_for(load, client, WARM_UP_S)
        before, used_s = _door(pipeline), time.process_time()
        tokens = load.tokens
        run_for(load, client, seconds + REPORT_S)
        generator_us = (time.process_time() - used_s) / (load.tokens - tokens) * 1e6
        after = _door(pipeline)
    came = arrived(load.records) + load.begins_at
    count = np.count_nonzero((before.at_s < came) & (came <= after.at_s))
    return _Figures(
        count / (after.at_s - before.at_s),
        (after.cpu_s - before.cpu_s) / count * 1e6,
        generator_us,
    )


def _door(pipeline: Pipeline) -> ServiceStatus:
    return next(service for service in pipeline.status().services if service.role == "http")


def _added_ms(
    endpoint: str, url: Url, seconds: float, step_ms: float, chats: bool
) -> dict[str, float]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
        each = [
            processes.submit(_stream, partial(connect, *arguments), seconds, chats)
            for connect, arguments in ((SocketClient, (endpoint,)), (HttpClient, (url, "demo", "")))
        ]
        at_socket, over_http = (stream.result() for stream in each)
    # A step's tokens come closer to one another than to those of other steps.
    nearest = np.abs(over_http[:, None] - at_socket[None, :]).argmin(1)
    added_ms = (over_http - at_socket[nearest]) * 1000
    added_ms = added_ms[np.abs(added_ms) < step_ms / 2]
    median, p90 = np.percentile(added_ms, [50, 90]).tolist()
    return {"median": round(median, 3), "p90": round(p90, 3)}


def _stream(connect: Connect, seconds: float, chats: bool) -> NDArray[np.float64]:
    """When the tokens of one stream came, by `time.monotonic`."""
    load = Load(Concurrency(1), _conversations(chats, Lengths(900, 900)), time.monotonic())
    with connect() as client:
        run_for(load, client, seconds)
    return arrived(load.records) + load.begins_at


def _conversations(chats: bool, output: Lengths) -> Iterator[Conversation]:
    shape = Shape(Lengths(16, 16), output)
    for (turn,) in random_conversations(0, shape, Sampling(ignore_eos=True)):
        yield [turn._replace(prompt=HELLO) if chats else turn]


if __name__ == "__main__":
    main()
