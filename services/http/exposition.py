"""`/metrics`: a pipeline's status in Prometheus' text format. docs/metrics.md lists the metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from nanovllm.control import (
    Histogram,
    HttpStats,
    IngressStats,
    SchedulerStats,
    ServiceStatus,
    Status,
    WorkerStats,
)
from nanovllm.services.http.metrics import BETWEEN_TOKENS_S, FIRST_TOKEN_S, WHOLE_S

CONTENT_TYPE = CONTENT_TYPE_LATEST


def exposition(status: Status) -> bytes:
    """The status, with the figures of all HTTP servers: whichever answers, answers the same."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(status))
    return generate_latest(registry)


class _Collected(Collector):
    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        services = self._status.services
        yield from _engines(services)
        yield from _device(services)
        yield from _requests(services)
        restarts = CounterMetricFamily(
            "nanovllm_service_restarts",
            "Starts of a service after its first.",
            labels=["role", "index", "engine"],
        )
        for service in services:
            name = [service.role, str(service.index), str(service.engine)]
            restarts.add_metric(name, service.restarts)
        yield restarts


def _engines(services: Sequence[ServiceStatus]) -> Iterator[Metric]:
    engines = {
        str(service.engine): service.stats
        for service in services
        if isinstance(service.stats, SchedulerStats)
    }
    unfinished = sum(s.stats.requests for s in services if isinstance(s.stats, IngressStats))
    if engines:
        yield GaugeMetricFamily(
            "nanovllm_num_requests_waiting",
            "Accepted requests, of all clients, whose sequence has no slot.",
            max(0, unfinished - sum(stats.running for stats in engines.values())),
        )
    for kind, name, text, value in _OF_AN_ENGINE:
        family = kind(f"nanovllm_{name}", text, labels=["engine"])
        for engine, stats in engines.items():
            family.add_metric([engine], value(stats))
        yield family


_OF_AN_ENGINE: Sequence[
    tuple[
        type[GaugeMetricFamily] | type[CounterMetricFamily],
        str,
        str,
        Callable[[SchedulerStats], float],
    ]
] = (
    (
        GaugeMetricFamily,
        "num_requests_running",
        "Sequences that have a slot.",
        lambda stats: stats.running,
    ),
    (
        GaugeMetricFamily,
        "kv_cache_usage_perc",
        "Share of the KV cache's blocks that sequences hold, from 0 to 1.",
        lambda stats: stats.blocks_used / max(1, stats.blocks_total),
    ),
    (
        CounterMetricFamily,
        "num_preemptions",
        "Sequences that lost their blocks to others.",
        lambda stats: stats.preemptions,
    ),
    (
        CounterMetricFamily,
        "prompt_tokens",
        "Prompt tokens of sequences that were started.",
        lambda stats: stats.prompt_tokens,
    ),
    (
        CounterMetricFamily,
        "prompt_tokens_cached",
        "Prompt tokens found in the cache.",
        lambda stats: stats.cached_tokens,
    ),
    (
        CounterMetricFamily,
        "generation_tokens",
        "Output tokens.",
        lambda stats: stats.generated,
    ),
)


def _device(services: Sequence[ServiceStatus]) -> Iterator[Metric]:
    busy = CounterMetricFamily(
        "nanovllm_device_busy_seconds",
        "Time in which the device of a rank had a step to work on.",
        labels=["rank", "engine"],
    )
    for service in services:
        if isinstance(service.stats, WorkerStats):
            name = [str(service.index), str(service.engine)]
            busy.add_metric(name, service.stats.busy_s)
    yield busy


def _requests(services: Sequence[ServiceStatus]) -> Iterator[Metric]:
    running = GaugeMetricFamily(
        "nanovllm_http_requests_running",
        "Requests of HTTP clients that the pipeline works on, a choice each.",
        labels=["door"],
    )
    finished = CounterMetricFamily(
        "nanovllm_request_success",
        "Requests of HTTP clients that have ended, by finish reason or error code.",
        labels=["door", "finished_reason"],
    )
    first_token = HistogramMetricFamily(
        "nanovllm_time_to_first_token_seconds",
        "From a streaming HTTP request to its first output.",
        labels=["door"],
    )
    between_tokens = HistogramMetricFamily(
        "nanovllm_inter_token_latency_seconds",
        "Between two output tokens of a stream.",
        labels=["door"],
    )
    whole = HistogramMetricFamily(
        "nanovllm_e2e_request_latency_seconds",
        "From an HTTP request to the end of its output.",
        labels=["door"],
    )
    for service in services:
        stats, door = service.stats, str(service.index)
        if isinstance(stats, HttpStats):
            running.add_metric([door], stats.running)
            for reason, count in sorted(stats.finished.items()):
                finished.add_metric([door, reason], count)
            _add(first_token, door, stats.first_token, FIRST_TOKEN_S)
            _add(between_tokens, door, stats.between_tokens, BETWEEN_TOKENS_S)
            _add(whole, door, stats.whole, WHOLE_S)
    yield from (running, finished, first_token, between_tokens, whole)


def _add(
    family: HistogramMetricFamily, door: str, histogram: Histogram, bounds: Sequence[float]
) -> None:
    names = [*map(str, bounds), "+Inf"]
    buckets = list(zip(names, accumulate(map(float, histogram.counts)), strict=True))
    family.add_metric([door], buckets, histogram.sum_s)
