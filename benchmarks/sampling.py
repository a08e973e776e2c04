"""How long sampling takes on a GPU, beside the time that one reading of the logits takes.

    python -m benchmarks.sampling

Every case is timed in a CUDA graph, on peaked and on flat bfloat16 logits of Qwen3's vocabulary.
Its tokens are compared with the reference's. The floor is the time of reading the logits once at
the bandwidth of a copy, measured in the same run. Few rows fit in the L2 cache, and may be faster.
For rows that do not need whole logits, "one of four ranks" is what a rank computes with --tp 4,
without gathering the shortlists.
"""

from __future__ import annotations

from collections.abc import Callable

import click
import torch
from torch import Tensor

from benchmarks.support.bandwidth import copy_bandwidth
from benchmarks.support.help import help_of
from nanovllm.kernels.sampling import fused, fused_shortlists, reference
from nanovllm.kernels.sampling.reference import SamplingTensors

VOCAB = 151_936
ROWS = (1, 32, 256, 512)
# Temperature, top_k, top_p, min_p.
CASES: dict[str, tuple[float, int, float, float]] = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (0.6, 0, 1.0, 0.0),
    "top-k 20, top-p 0.95": (0.6, 20, 0.95, 0.0),
    "top-k 200": (0.6, 200, 1.0, 0.0),
    "top-p 0.9": (0.6, 0, 0.9, 0.0),
    "min-p 0.05": (0.6, 0, 1.0, 0.05),
}
# Standard deviation of the logits.
SHAPES = {"peaked": 2.6, "flat": 0.5}
TIMED_S = 0.05
SHARDS = 4
BY_SHORTLISTS = ("greedy", "temperature", "top-k 20, top-p 0.95")


@click.command(help=help_of(__doc__))
def main() -> None:
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copying at {bandwidth / 1e12:.2f} TB/s\n")
    print(
        "| logits | sampling | rows | µs | floor µs | ratio | tokens unlike the reference's |"
        " one of four ranks, µs | tokens unlike the reference's |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for shape, deviation in SHAPES.items():
        for case, values in CASES.items():
            for rows in ROWS:
                logits = random_logits(rows, deviation)
                params = parameters(rows, *values)
                positions = torch.arange(rows, device="cuda")
                found = fused.sample(logits, params, positions)
                expected = reference.sample(logits, params, positions)
                seconds = graph_seconds(lambda: fused.sample(logits, params, positions))  # noqa: B023
                floor = logits.numel() * logits.element_size() / bandwidth
                rank = " | "
                if case in BY_SHORTLISTS:
                    sharded, rank_seconds = of_a_rank(logits, params, positions)
                    rank = f"{rank_seconds * 1e6:.1f} | {int((sharded != expected).sum())}"
                print(
                    f"| {shape} | {case} | {rows} | {seconds * 1e6:.1f} | {floor * 1e6:.1f} |"
                    f" {seconds / floor:.2f} | {int((found != expected).sum())} | {rank} |",
                    flush=True,
                )


def of_a_rank(logits: Tensor, params: SamplingTensors, positions: Tensor) -> tuple[Tensor, float]:
    """Tokens drawn from the shortlists of all shards; and the seconds that it takes to make one
    shortlist, and to draw from all."""
    shard = VOCAB // SHARDS
    parts = [(first, logits[:, first : first + shard].clone()) for first in range(0, VOCAB, shard)]
    gathered = torch.cat(
        [fused_shortlists.shortlist(part, params, positions, first) for first, part in parts],
        dim=-1,
    )
    first, part = parts[-1]

    def step() -> Tensor:
        fused_shortlists.shortlist(part, params, positions, first)
        return fused_shortlists.sample_shortlists(gathered, params, positions)

    return step(), graph_seconds(step)


def random_logits(rows: int, deviation: float) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(rows)
    logits = torch.randn(rows, VOCAB, generator=generator, device="cuda") * deviation
    return logits.bfloat16()


def parameters(
    rows: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> SamplingTensors:
    return SamplingTensors(
        temperature=torch.full((rows,), temperature, device="cuda"),
        top_k=torch.full((rows,), top_k, dtype=torch.int32, device="cuda"),
        top_p=torch.full((rows,), top_p, device="cuda"),
        min_p=torch.full((rows,), min_p, device="cuda"),
        seed=torch.arange(rows, device="cuda"),
    )


def graph_seconds(call: Callable[[], object]) -> float:
    """The median time of a call that is replayed from a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times: list[float] = []
    while sum(times) < TIMED_S and len(times) < 200:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    main()
