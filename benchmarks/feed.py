"""Is the device fed? The whole pipeline on a simulated device, under a steady load.

    python -m benchmarks.feed
    python -m benchmarks.feed --engines 4 --sequences 64 --step-ms 20 --depth 3
    python -m benchmarks.feed --curve

Prints one JSON line for each load and pipeline depth:

    device_busy        share of the time for which the device had work; of each engine
    client_received    tokens that reached the client, over those that the device made
    lag_ms             from the end of a step on the device to its token at the client
    scheduler_us       CPU time of the scheduler, a step
    plan_bytes         size of a steady step plan
    constrained        of requests with a grammar (`--constrained`): their share, and their tokens a
                       second while they run, over those of the others
"""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec
import numpy as np

from benchmarks.support.help import help_of
from benchmarks.support.load import run_for
from benchmarks.support.outputs import ENDLESS_JSON
from benchmarks.support.pipeline import Pipeline
from nanovllm.bench.arrivals import Concurrency
from nanovllm.bench.client import LoadClient, SocketClient
from nanovllm.bench.load import Load
from nanovllm.bench.prompts import Conversation, Shape, random_conversations
from nanovllm.bench.report import arrived
from nanovllm.bench.work import Lengths
from nanovllm.control import IngressStats, SchedulerStats, Stats, Status, WorkerStats
from nanovllm.keys import make_keys
from nanovllm.names import ServiceId
from nanovllm.protocol import Delta, Sampling, ServerMessage

PROMPT_TOKENS = 16
OUTPUT_TOKENS = Lengths(50, 300)
# The simulated device stamps a logged token with the time its step ended: minus the logprob is
# the machine's monotonic clock in µs, modulo this.
STAMP_MODULO = 1 << 24
WARM_UP_S = 4.0


class Case(NamedTuple):
    """How many sequences an engine runs at the same time, and how long a step takes on its
    device."""

    sequences: int
    step_ms: float


CASES = (Case(256, 2.0), Case(1, 0.5))


@click.command(help=help_of(__doc__))
@click.option("--seconds", default=12.0, show_default=True, help="Length of each measurement.")
@click.option("--depth", "depths", type=int, multiple=True, default=(4, 1), show_default=True)
@click.option("--sequences", type=int, help="Only the load with so many sequences an engine.")
@click.option("--step-ms", type=float, help="Of the load with --sequences, whatever their number.")
@click.option("--engines", default=1, show_default=True)
@click.option(
    "--constrained",
    type=click.FloatRange(0, 1),
    default=0.0,
    help="The share of requests whose answers must be JSON of a schema.",
)
@click.option("--curve", is_flag=True, help="All connections by TCP with keys, as on two machines.")
@click.option(
    "--otlp",
    default="",
    help="Traces go there: of all requests, unless OTEL_TRACES_SAMPLER says of which.",
)
def main(
    seconds: float,
    depths: tuple[int, ...],
    sequences: int | None,
    step_ms: float | None,
    engines: int,
    constrained: float,
    curve: bool,
    otlp: str,
) -> None:
    cases = [case for case in CASES if sequences in (None, case.sequences)]
    if sequences is not None and step_ms is not None:
        cases = [Case(sequences, step_ms)]
    for case in cases:
        for depth in depths:
            figures = measure(case, depth, seconds, engines, constrained, curve, otlp)
            click.echo(json.dumps(figures))


def measure(
    case: Case,
    depth: int,
    seconds: float,
    engines: int = 1,
    constrained: float = 0.0,
    curve: bool = False,
    otlp: str = "",
) -> dict[str, Any]:
    """Runs a pipeline of its own under `case` for `seconds` after a warm-up.

    Args:
        constrained: the share of requests with a grammar.
        curve: whether all but the ingress joins from another supervisor, and every connection
            between the two, and the client's, is TCP with keys.
        otlp: where traces go; empty for none.
    """
    words = [*arguments(case, depth), *(["--otlp", otlp] if otlp else [])]
    with _connected(words, engines, curve) as (pipeline, client):
        figures = measured(case, seconds, engines, pipeline.status, client, constrained)
    return {
        "sequences": case.sequences,
        "step_ms": case.step_ms,
        "pipeline_depth": depth,
        "engines": engines,
        **({"curve": True} if curve else {}),
        **({"otlp": otlp} if otlp else {}),
        **figures,
    }


def arguments(case: Case, depth: int) -> list[str]:
    """Of the launcher."""
    words = f"--device sim --sim-step-ms {case.step_ms} --pipeline-depth {depth}"
    words += f" --max-num-seqs {case.sequences} --max-model-len 1024 --log-level warning"
    return words.split()


def measured(
    case: Case,
    seconds: float,
    engines: int,
    status: Callable[[], Status],
    client: SocketClient,
    constrained: float = 0.0,
) -> dict[str, Any]:
    """Puts a running pipeline under the load of `case`.

    Args:
        status: asks the pipeline.
    """
    # A few more than run, so that whenever a sequence ends another is waiting.
    outstanding = engines * (case.sequences + max(1, case.sequences // 16))
    conversations = _probed(case.sequences > 1, constrained)
    load = Load(Concurrency(outstanding), conversations, time.monotonic())
    stamps = Stamps(client)
    run_for(load, stamps, WARM_UP_S)
    stamps.lags_s.clear()
    before = status()
    # A report a second from each service, which says when it was made.
    run_for(load, stamps, seconds + 1.0)
    after = status()
    run_for(load, stamps, 0.2)
    return {
        **_figures(before, after, load, stamps.lags_s),
        **({"constrained": _constrained(load, constrained)} if constrained else {}),
    }


@contextlib.contextmanager
def _connected(
    arguments: list[str], engines: int, curve: bool
) -> Iterator[tuple[Pipeline, SocketClient]]:
    """A pipeline, and a client of it."""
    brings = ["--engines", str(engines), "--tokenizers", "1", "--detokenizers", "1"]
    if not curve:
        with (
            Pipeline("", *arguments, *brings) as pipeline,
            SocketClient(pipeline.endpoint) as client,
        ):
            yield pipeline, client
        return
    none = ["--engines", "0", "--tokenizers", "0", "--detokenizers", "0"]
    with tempfile.TemporaryDirectory() as directory:
        *_, key = make_keys(Path(directory), "feed")
        ports = _free_ports()
        ingress, services = (f"tcp://127.0.0.1:{port}" for port in ports[:2])
        where = ["--ingress", ingress, "--services", services, "--keys", directory]
        join = ["--join", services, "--keys", directory, "--log-level", "warning"]
        with (
            Pipeline("", *arguments, *where, *none) as pipeline,
            Pipeline("", *join, *brings),
            SocketClient(ingress, str(key)) as client,
        ):
            yield pipeline, client


def _free_ports() -> range:
    """Three in a row: --services takes two."""
    while True:
        with contextlib.suppress(OSError), contextlib.ExitStack() as probes:
            first = probes.enter_context(socket.create_server(("127.0.0.1", 0)))
            ports = range(port := first.getsockname()[1], port + 3)
            for port in ports[1:]:
                probes.enter_context(socket.create_server(("127.0.0.1", port)))
            return ports


def _is_constrained(number: int, share: float) -> bool:
    """Whether request `number` has a grammar: spread evenly."""
    return int((number + 1) * share) > int(number * share)


def _constrained(load: Load, share: float) -> dict[str, float | None]:
    rates: dict[bool, list[float]] = {True: [], False: []}
    for number, record in enumerate(load.records):
        if len(times := record.arrived_s) > 1 and times[-1] > times[0] >= 0:
            rates[_is_constrained(number, share)].append((len(times) - 1) / (times[-1] - times[0]))
    others = statistics.median(rates[False]) if rates[False] else None
    of_others = None if others is None else round(statistics.median(rates[True]) / others, 4)
    return {"share": share, "of_the_others_tokens": of_others}


def _probed(several: bool, constrained: float) -> Iterator[Conversation]:
    """Random conversations, some of which ask for logprobs, which carry the device's stamps, and
    some of which have a grammar."""
    every = 64 if several else 2
    shape = Shape(Lengths(PROMPT_TOKENS, PROMPT_TOKENS), OUTPUT_TOKENS)
    for number, (turn,) in enumerate(random_conversations(0, shape, Sampling(ignore_eos=True))):
        logprobs = None if number % every else 0
        sampling = msgspec.structs.replace(turn.sampling, logprobs=logprobs)
        if _is_constrained(number, constrained):
            sampling.ignore_eos = False
            sampling.structured_outputs = ENDLESS_JSON
        yield [turn._replace(sampling=sampling)]


class Stamps:
    """Implements `LoadClient` by another one, and reads the device's stamps as they come.

    Attributes:
        lags_s: from the end of a token's step until the token came.
    """

    def __init__(self, client: LoadClient) -> None:
        self._client = client
        self.lags_s: list[float] = []
        self.submit = client.submit

    def receive(self, until: float) -> Sequence[ServerMessage]:
        messages = self._client.receive(until)
        micros = int(time.monotonic() * 1e6)
        for message in messages:
            if isinstance(message, Delta) and message.logprobs:
                for entry in message.logprobs:
                    self.lags_s.append((micros + round(entry[0][1])) % STAMP_MODULO / 1e6)
        return messages


def _figures(before: Status, after: Status, load: Load, lags_s: list[float]) -> dict[str, Any]:
    schedulers = _pairs(before, after, SchedulerStats)
    (ingress,) = _pairs(before, after, IngressStats)
    steps, generated = _rate(schedulers, "steps"), _rate(schedulers, "generated")
    first = schedulers[0]
    plans = [s.stats.plan_bytes for s in after.services if isinstance(s.stats, SchedulerStats)]
    lags_ms = sorted(lag * 1000 for lag in lags_s)
    came = arrived(load.records) + load.begins_at
    received = np.count_nonzero((first.was.at_s < came) & (came <= first.now.at_s))
    return {
        "seconds": round(first.seconds, 2),
        "device_busy": [
            round(_rate([pair], "busy_s"), 4) for pair in _pairs(before, after, WorkerStats)
        ],
        "client_received": round(received / first.seconds / generated, 4),
        "tokens_per_s": round(generated),
        "requests_finished": load.conversations,
        "lag_ms": {
            "median": round(statistics.median(lags_ms), 2),
            "p99": round(lags_ms[int(len(lags_ms) * 0.99)], 2),
        },
        "scheduler_us": round(sum(pair.cpu_share for pair in schedulers) / steps * 1e6, 1),
        "ingress_us_a_request": round(ingress.cpu_share / _rate([ingress], "finished") * 1e6, 1),
        "plan_bytes": max(plans),
        "cpu_share": {
            str(service.service): round(_Pair(before, after, service.service).cpu_share, 3)
            for service in after.services
        },
    }


class _Pair:
    """Two reports of one service."""

    def __init__(self, before: Status, after: Status, name: ServiceId) -> None:
        self.was = next(service for service in before.services if service.service == name)
        self.now = next(service for service in after.services if service.service == name)
        self.seconds = self.now.at_s - self.was.at_s

    @property
    def cpu_share(self) -> float:
        return (self.now.cpu_s - self.was.cpu_s) / self.seconds


def _pairs(before: Status, after: Status, kind: type[Stats]) -> list[_Pair]:
    """The reports of all services of a kind."""
    names = [service.service for service in after.services if isinstance(service.stats, kind)]
    return [_Pair(before, after, name) for name in names]


def _rate(pairs: Sequence[_Pair], counter: str) -> float:
    """How much a counter of all these services grows in a second."""
    return sum(
        float(getattr(pair.now.stats, counter) - getattr(pair.was.stats, counter)) / pair.seconds
        for pair in pairs
    )


if __name__ == "__main__":
    main()
