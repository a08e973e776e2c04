"""The sum over the ranks that ends a layer's halves, with the residual and the norm: over NCCL and
over peer memory, one-shot and two-shot. µs a call, in CUDA graphs of bfloat16 rows.

    python -m benchmarks.collectives --tp 4
"""

from __future__ import annotations

import tempfile
from multiprocessing import get_context
from pathlib import Path

import click
import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from benchmarks.support.help import help_of
from benchmarks.support.timing import random, seconds_per_call
from nanovllm.kernels.layers.fused import FusedOps
from nanovllm.kernels.layers.ops import Norm
from nanovllm.services.gpu_worker.model import peers
from nanovllm.services.gpu_worker.model.parallel import TensorParallel

HIDDEN = (1024, 4096)
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 2048)


@click.command(help=help_of(__doc__))
@click.option("--tp", type=click.IntRange(2, 8), default=2, show_default=True)
def main(tp: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        context = get_context("spawn")
        others = [
            context.Process(target=run, args=(rank, tp, directory), daemon=True)
            for rank in range(1, tp)
        ]
        for other in others:
            other.start()
        run(0, tp, directory)
        for other in others:
            other.join()


def run(rank: int, ranks: int, directory: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = FileStore(str(Path(directory) / "store"), ranks)
    most = ROWS[-1] * HIDDEN[-1] * 2
    peers.MAX_ONE_SHOT_BYTES = peers.MAX_ONE_SHOT_BYTES_OF_MORE = peers.MAX_TWO_SHOT_BYTES = most
    nccl = TensorParallel.connect(rank, ranks, store, device)
    if rank == 0:
        print(f"{ranks} x {torch.cuda.get_device_name()}\n")
        print("| hidden | rows | NCCL, then the norm | one-shot | two-shot | without the norm |")
        print("|---|---|---|---|---|---|")
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        for hidden in HIDDEN:
            tp = nccl.with_peers(hidden, torch.bfloat16, device)
            if tp.peers is None:
                raise click.ClickException("these GPUs cannot reach one another's memory")
            sums, two_shot = tp.peers.sums, tp.peers.two_shot
            norm = Norm(random(hidden), 1e-6)
            for rows in ROWS:
                x, residual = random(rows, hidden), random(rows, hidden)
                times = [
                    seconds_per_call(call)
                    for call in (
                        lambda _: nccl.add_rms_norm(x, residual, norm, FusedOps()),  # noqa: B023
                        lambda _: sums.add_rms_norm(x, residual, norm),  # noqa: B023
                        lambda _: two_shot.add_rms_norm(x, residual, norm),  # noqa: B023
                        lambda _: sums.add(x, residual),  # noqa: B023
                    )
                ]
                if rank == 0:
                    figures = " | ".join(f"{seconds * 1e6:.1f}" for seconds in times)
                    print(f"| {hidden} | {rows} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
