"""What a person sees of a run: a progress bar, and a table at the end."""

from __future__ import annotations

import io
import math
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final, Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nanovllm.bench.load import Load
from nanovllm.bench.report import Report, Spread, Used
from nanovllm.wording import counted

# The bar shows the time to first token of so many requests: the latest that have one.
RECENT: Final = 200
TABLE_WIDTH: Final = 120


class Watch:
    """Watches a load: draws the bar, if stderr is a terminal, and notes what the process uses.

    Args:
        conversations: how many are measured; None: as many as there are in `seconds`.
    """

    def __init__(self, load: Load, conversations: int | None, seconds: float) -> None:
        self.used: list[Used] = []
        self._load = load
        self._seconds = seconds
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[now]}"),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,
            transient=True,
            disable=not console.is_terminal,
        )
        self._by_time = seconds < math.inf
        total = seconds if self._by_time else conversations
        self._task = self._bar.add_task("warming up", total=total, now="")

    def tick(self) -> None:
        load = self._load
        now_s = time.monotonic() - load.begins_at
        self.used.append(Used(now_s, time.process_time(), _loop_s(), load.tokens))
        if self._bar.disable:
            return
        stage = "warming up"
        if now_s >= 0:
            stage = "measuring" if now_s < self._seconds else "waiting for the last"
        self._bar.update(
            self._task,
            description=stage,
            completed=max(0.0, now_s) if self._by_time else load.conversations,
            now=self._now(),
        )
        self._bar.refresh()

    def _now(self) -> str:
        parts = [f"{self._load.running} running"]
        if len(self.used) > 1:
            before, now = self.used[-2:]
            rate = (now.tokens - before.tokens) / max(1e-9, now.at_s - before.at_s)
            parts.append(f"{rate:,.0f} tokens/s")
        latest = (record for record in reversed(self._load.records) if record.arrived_s)
        waits = [record.arrived_s[0] - record.due_s for record in islice(latest, RECENT)]
        if waits:
            parts.append(f"first token {statistics.median(waits) * 1000:,.1f} ms")
        return ", ".join(parts)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _loop_s() -> float:
    """Seconds that this thread has run, or has waited for a core."""
    try:
        ran, waited, _ = Path("/proc/thread-self/schedstat").read_text().split()
    except FileNotFoundError:  # a kernel that does not count the wait
        return time.thread_time()
    return (int(ran) + int(waited)) / 1e9


def print_report(report: Report, head: str) -> None:
    """The table, to stdout."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # of an encoding without µ, say
    # A narrow terminal wraps the table, rather than that figures are cut.
    console = Console(highlight=False, soft_wrap=True, width=TABLE_WIDTH)
    console.print(head, markup=False)
    latencies = report.latencies_ms
    table = Table("ms", box=box.SIMPLE_HEAD)
    for name in ("mean", "median", "p90", "p99", "max"):
        table.add_column(name, justify="right")
    for name, spread in (
        ("time to first token", latencies.first_token),
        ("between tokens", latencies.per_token),
        ("between deltas", latencies.between_deltas),
        ("whole answer", latencies.whole),
        ("lateness of sending", report.generator.lateness_ms),
    ):
        table.add_row(name, *_cells(spread))
    console.print(table)
    for line in _lines(report):
        console.print(line, markup=False)


def _cells(spread: Spread | None) -> list[str]:
    if spread is None:
        return ["-"] * 5
    values = spread.mean, spread.median, spread.p90, spread.p99, spread.max
    return [f"{value:,.2f}" for value in values]


def _lines(report: Report) -> Iterator[str]:
    requests, tokens, rates = report.requests, report.tokens, report.throughput
    ends = [f"{count} {reason}" for reason, count in sorted(requests.finished.items())]
    finished = sum(requests.finished.values())
    line = f"requests       {requests.sent} sent, {finished} finished"
    line += f" ({', '.join(ends)})" if ends else ""
    line += f", {requests.unfinished} unfinished" if requests.unfinished else ""
    yield f"{line}, {rates.requests:,.2f} a second"
    yield f"input          {counted(tokens.input, 'token')}, {rates.input_tokens:,.0f} a second"
    if tokens.cached_share is not None:
        yield f"prefix cache   {tokens.cached_share:.1%} of the input came from it"
    yield f"output         {counted(tokens.output, 'token')}, {rates.output_tokens:,.0f} a second"
    for code, count in sorted(requests.errors.items()):
        yield f"error          {counted(count, 'request')}: {code}"
    generator = report.generator
    if generator.cpu_share is not None:
        used = f"generator      {generator.cpu_share:.0%} of a core"
        if generator.cpu_us_a_token is not None:
            used += f", {generator.cpu_us_a_token:.1f} µs a token"
        yield used
    ended = ", interrupted" if report.interrupted else ""
    warmed = counted(report.warm_up_requests, "request")
    yield f"measured       {report.seconds:.2f} s{ended}, after {warmed} that warmed up"
