"""From the records of a run to its figures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from nanovllm.bench.load import Record
from nanovllm.protocol import Usage

# Above this share of the time, the loop that sends and reads is taken for the bottleneck.
BUSY_LOOP: Final = 0.8
# A shorter measurement says nothing of it.
SHORTEST_S: Final = 0.5
# Requests sent later than this at the median come too late for their arrivals to mean anything.
LATE_MS: Final = 10.0


class Used(NamedTuple):
    """What the generator's process has used by a time, in seconds, and the tokens that had come."""

    at_s: float
    cpu_s: float  # of all threads
    loop_s: float  # the thread that sends and reads ran, or waited for a core
    tokens: int


class Spread(msgspec.Struct):
    """Of `count` values, in milliseconds."""

    count: int
    mean: float
    median: float
    p90: float
    p99: float
    max: float


class Latencies(msgspec.Struct):
    """Of requests that have not failed; the first token and the whole from when the request was
    due: a request that is sent late has waited. None: no value.

    `per_token`: of each request, the time from its first token to its last, over the tokens after
    the first. `between_deltas`: the pauses that a reader sees; tokens may come several at a time.
    """

    first_token: Spread | None
    per_token: Spread | None
    between_deltas: Spread | None
    whole: Spread | None


class Throughput(msgspec.Struct):
    """A second, of all that came while measuring, also for requests that were sent before."""

    requests: float
    input_tokens: float
    output_tokens: float


class Requests(msgspec.Struct):
    """How many of those measured; `errors` by code, `finished` by reason."""

    sent: int
    finished: dict[str, int]
    errors: dict[str, int]
    unfinished: int


class Tokens(msgspec.Struct):
    """Of the measured requests; `input` of those alone that finished. `cached`: of the input, from
    the prefix cache."""

    input: int
    cached: int
    output: int
    cached_share: float | None


class Generator(msgspec.Struct):
    """What the generator itself did. `lateness_ms`: from when requests were due until they were
    sent; `loop_share`: of the time, the thread that sends and reads ran, or waited for a core."""

    lateness_ms: Spread | None
    cpu_share: float | None
    loop_share: float | None
    cpu_us_a_token: float | None
    warnings: list[str]


class Detail(msgspec.Struct):
    """One request, as in `Record`."""

    measured: bool
    turn: int
    due_s: float
    sent_s: float
    first_token_s: float | None
    last_token_s: float | None
    ended_s: float | None
    output_tokens: int
    usage: Usage | None
    finish_reason: str | None
    error: str | None
    message: str


class Report(msgspec.Struct):
    """All figures of a run. `seconds`: how long was measured."""

    seconds: float
    interrupted: bool
    warm_up_requests: int
    requests: Requests
    throughput: Throughput
    tokens: Tokens
    latencies_ms: Latencies
    generator: Generator


def report(
    records: Sequence[Record],
    used: Sequence[Used],
    ended_s: float,
    seconds: float = math.inf,
    *,
    interrupted: bool = False,
) -> Report:
    """The figures of a run that ended `ended_s` after its measurement began.

    Args:
        used: in order of time.
        seconds: how long requests were sent; what came later, of these, has no part in throughput.
    """
    measured = [record for record in records if record.measured]
    window_s = max(0.0, min(seconds, ended_s))
    finished = [record for record in measured if record.usage is not None]
    usages = [record.usage for record in finished if record.usage is not None]
    prompt_tokens = sum(usage.prompt_tokens for usage in usages)
    cached = sum(usage.cached_tokens for usage in usages)
    return Report(
        seconds=window_s,
        interrupted=interrupted,
        warm_up_requests=len(records) - len(measured),
        requests=Requests(
            sent=len(measured),
            finished=dict(Counter(str(record.finish_reason) for record in finished)),
            errors=dict(Counter(record.error for record in measured if record.error is not None)),
            unfinished=sum(record.ended_s is None for record in measured),
        ),
        throughput=_throughput(records, window_s),
        tokens=Tokens(
            input=prompt_tokens,
            cached=cached,
            output=sum(len(record.arrived_s) for record in measured),
            cached_share=cached / prompt_tokens if prompt_tokens else None,
        ),
        latencies_ms=_latencies(measured),
        generator=_generator(measured, used, seconds),
    )


def arrived(records: Iterable[Record]) -> NDArray[np.float64]:
    """float64 [tokens], when output tokens came, request by request."""
    times = [np.frombuffer(record.arrived_s, np.float64) for record in records if record.arrived_s]
    return np.concatenate(times) if times else np.empty(0)


def _throughput(records: Sequence[Record], window_s: float) -> Throughput:
    if not window_s:
        return Throughput(0.0, 0.0, 0.0)
    times = arrived(records)
    tokens = np.count_nonzero((times >= 0) & (times < window_s))
    usages = [
        record.usage
        for record in records
        if record.usage is not None
        and record.ended_s is not None
        and 0 <= record.ended_s <= window_s
    ]
    return Throughput(
        requests=len(usages) / window_s,
        input_tokens=sum(usage.prompt_tokens for usage in usages) / window_s,
        output_tokens=float(tokens / window_s),
    )


def _latencies(measured: Sequence[Record]) -> Latencies:
    first, per_token, whole = [], [], []
    pauses = []
    for record in measured:
        if record.error is not None:
            continue
        times = np.frombuffer(record.arrived_s, np.float64)
        if len(times):
            first.append(times[0] - record.due_s)
        if len(times) > 1:
            per_token.append((times[-1] - times[0]) / (len(times) - 1))
            pauses.append(np.diff(np.unique(times)))
        if record.usage is not None and record.ended_s is not None:
            whole.append(record.ended_s - record.due_s)
    return Latencies(
        first_token=spread_ms(first),
        per_token=spread_ms(per_token),
        between_deltas=spread_ms(np.concatenate(pauses)) if pauses else None,
        whole=spread_ms(whole),
    )


def spread_ms(seconds: Sequence[float] | NDArray[np.float64]) -> Spread | None:
    if not len(seconds):
        return None
    values = np.asarray(seconds) * 1000
    median, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
    return Spread(len(values), float(values.mean()), median, p90, p99, float(values.max()))


def _generator(measured: Sequence[Record], used: Sequence[Used], seconds: float) -> Generator:
    lateness = spread_ms([record.sent_s - record.due_s for record in measured])
    generator = Generator(lateness, None, None, None, [])
    if not used:
        return generator
    # Neither the warm-up is measured, if there was any time after it, nor the wait for the last
    # answers, which would dilute the shares.
    first = next((sample for sample in reversed(used) if sample.at_s <= 0), used[0])
    last = next((sample for sample in used if sample.at_s >= seconds), used[-1])
    if (passed_s := last.at_s - first.at_s) > 0:
        generator.cpu_share = (last.cpu_s - first.cpu_s) / passed_s
        generator.loop_share = (last.loop_s - first.loop_s) / passed_s
        if tokens := last.tokens - first.tokens:
            generator.cpu_us_a_token = (last.cpu_s - first.cpu_s) / tokens * 1e6
        if generator.loop_share > BUSY_LOOP and passed_s > SHORTEST_S:
            generator.warnings.append(
                f"this generator was the bottleneck: its loop ran, or waited for a core, for"
                f" {generator.loop_share:.0%} of the time. Lower the load, or give it more cores"
            )
    if lateness is not None and lateness.median > LATE_MS:
        generator.warnings.append(
            f"half of the requests were sent more than {lateness.median:.0f} ms late: this"
            " generator was the bottleneck, or the machine had no time for it"
        )
    return generator


def details(records: Iterable[Record]) -> list[Detail]:
    return [
        Detail(
            measured=record.measured,
            turn=record.turn,
            due_s=record.due_s,
            sent_s=record.sent_s,
            first_token_s=record.arrived_s[0] if record.arrived_s else None,
            last_token_s=record.arrived_s[-1] if record.arrived_s else None,
            ended_s=record.ended_s,
            output_tokens=len(record.arrived_s),
            usage=record.usage,
            finish_reason=record.finish_reason,
            error=record.error,
            message=record.message,
        )
        for record in records
    ]
