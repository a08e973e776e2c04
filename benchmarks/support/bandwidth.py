"""What a GPU's memory allows."""

from __future__ import annotations

import statistics

import click

COPY_BYTES = 2 << 30
COPIES = 20


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy on the device; the median of several.

    Raises click.ClickException where there is no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise click.ClickException("this benchmark needs a GPU")
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times_ms = []
    for _ in range(COPIES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    del source, target
    torch.cuda.empty_cache()
    return float(2 * COPY_BYTES / (statistics.median(times_ms) / 1000))
