"""What `nanovllm status` shows."""

from __future__ import annotations

from typing import Any

import msgspec

from nanovllm.control import (
    DetokenizerStats,
    HttpStats,
    IngressStats,
    SchedulerStats,
    ServiceStatus,
    Stats,
    Status,
    TokenizerStats,
    WorkerStats,
)
from nanovllm.names import ServiceId
from nanovllm.wording import counted


def to_json(status: Status) -> str:
    """The status as a JSON object, with the field names of `Status`."""
    return msgspec.json.encode(_as_dict(status)).decode()


def render(before: Status, now: Status) -> str:
    """A table of the services, and the state of each engine.

    Args:
        before: an earlier status, for the rates.
        now: the status to show.
    """
    earlier = {s.service: s for s in before.services}
    several = any(service.machine for service in now.services)
    machine = ("MACHINE",) if several else ()
    rows = [(*machine, "SERVICE", "PID", "STATE", "UPTIME", "RESTARTS", "CPU", "WORK")]
    for service in now.services:
        then = earlier.get(service.service)
        rows.append(
            (
                *((service.machine or "main",) if several else ()),
                str(service.service),
                str(service.pid),
                service.state,
                _duration(service.uptime_s),
                str(service.restarts),
                _percent(service.cpu_s, then.cpu_s if then else 0.0, service, then),
                _work(service.stats),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    head = f"{now.model} at {now.endpoint}{f' and {now.http}' if now.http else ''}"
    engines = sorted({s.engine for s in now.services if isinstance(s.stats, SchedulerStats)})
    for engine in engines:
        table.append("" if len(engines) == 1 else f"\nengine {engine}")
        table += _engine(now, earlier, engine)
    return "\n".join([head, "", *table])


def _engine(now: Status, earlier: dict[ServiceId, ServiceStatus], engine: int) -> list[str]:
    lines: list[str] = []
    for service in now.services:
        if service.engine != engine:
            continue
        stats = service.stats
        then = earlier.get(service.service)
        if isinstance(stats, SchedulerStats):
            hits = f"{stats.cached_tokens / max(1, stats.prompt_tokens):.0%}"
            lines += [
                f"sequences     {stats.running} running, {stats.waiting} waiting,"
                f" {counted(stats.records, 'record')}",
                f"KV blocks     {stats.blocks_used} of {stats.blocks_total} used",
                f"prefix cache  {hits} of {counted(stats.prompt_tokens, 'prompt token')}"
                " came from it",
                f"output        {counted(stats.generated, 'token')} in"
                f" {counted(stats.steps, 'step')}, {counted(stats.preemptions, 'preemption')}",
            ]
        elif isinstance(stats, WorkerStats) and service.index == 0:
            was = then.stats.busy_s if then and isinstance(then.stats, WorkerStats) else 0.0
            lines.append(f"device busy   {_percent(stats.busy_s, was, service, then)}")
    return lines


def _work(stats: Stats | None) -> str:
    if isinstance(stats, IngressStats):
        clients = counted(stats.sessions, "client")
        return f"{clients}, {stats.requests} unfinished, {stats.finished} finished"
    if isinstance(stats, TokenizerStats):
        return f"{stats.queued} queued, {stats.tokenized} tokenized"
    if isinstance(stats, SchedulerStats):
        return f"{stats.running} running, {stats.waiting} waiting"
    if isinstance(stats, WorkerStats):
        return f"{counted(stats.slots_used, 'slot')} used, {counted(stats.steps, 'step')}"
    if isinstance(stats, DetokenizerStats):
        return f"{counted(stats.requests, 'request')}, {counted(stats.tokens, 'token')}"
    if isinstance(stats, HttpStats):
        return f"{stats.running} unfinished, {sum(stats.finished.values())} finished"
    return ""


def _percent(now: float, then: float, service: ServiceStatus, before: ServiceStatus | None) -> str:
    """The share of the time between two reports; "-" unless one process made both reports."""
    if service.stats is None or before is None or before.pid != service.pid:
        return "-"
    seconds = service.at_s - before.at_s
    return f"{(now - then) / seconds:.0%}" if seconds > 0 and before.stats is not None else "-"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _as_dict(value: Any) -> Any:
    """Structs as dicts: msgspec encodes the structs of `messages` as arrays."""
    if isinstance(value, msgspec.Struct):
        return {name: _as_dict(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, list):
        return [_as_dict(item) for item in value]
    return value
