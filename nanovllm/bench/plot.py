"""`--plot`: latencies and throughput over time, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from nanovllm.bench.load import Record
from nanovllm.bench.report import arrived

# Throughput is shown in so many intervals at most, none shorter than this.
INTERVALS: Final = 200
SHORTEST_S: Final = 0.1


def check_plot(path: Path) -> None:
    """Raises ValueError if there is no matplotlib, or it draws no such file."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'nanovllm[plot]'") from None
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"--plot {path}: give it one of the endings {', '.join(sorted(formats))}")


def plot(records: Sequence[Record], path: Path, title: str) -> None:
    """Draws the run, its warm-up included, into `path`, whose ending says in which format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 9), layout="constrained")
    figure.suptitle(title, parse_math=False)
    rate, running, first, whole = figure.subplots(4, 1, sharex=True)
    times = arrived(records)
    start_s = min((record.due_s for record in records), default=0.0)
    ends = [record.ended_s for record in records if record.ended_s is not None]
    end_s = max([start_s + SHORTEST_S, *ends, *times[-1:]])
    bins = max(1, min(INTERVALS, int((end_s - start_s) / SHORTEST_S)))
    counts, edges = np.histogram(times, bins, (start_s, end_s))
    rate.stairs(counts / np.diff(edges), edges)
    rate.set_ylabel("output tokens/s")
    at = [*((record.sent_s, 1) for record in records), *((ended, -1) for ended in ends)]
    moments = np.array(sorted(at)) if at else np.zeros((0, 2))
    running.step(moments[:, 0], np.cumsum(moments[:, 1]), where="post")
    running.set_ylabel("requests running")
    for axes, label, latencies in (
        (first, "first token, ms", [(r.due_s, r.arrived_s[0]) for r in records if r.arrived_s]),
        (
            whole,
            "whole answer, ms",
            [(r.due_s, r.ended_s) for r in records if r.usage is not None and r.ended_s],
        ),
    ):
        pairs = np.array(latencies) if latencies else np.zeros((0, 2))
        axes.plot(pairs[:, 0], (pairs[:, 1] - pairs[:, 0]) * 1000, ".", markersize=3)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    for axes in (rate, running, first, whole):
        axes.axvline(0, color="grey", linewidth=1, linestyle=":")  # the warm-up ends
    whole.set_xlabel("seconds since the measurement began; a request stands at when it was due")
    figure.savefig(path)
