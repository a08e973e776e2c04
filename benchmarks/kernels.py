"""The kernels of a decoder layer on a GPU, at Qwen3-0.6B's shapes in bfloat16: each is checked
against its reference and timed, and the products of a few rows are swept over their tunings.

Calls are timed inside CUDA graphs, as decode steps run, gaps between kernels included. Weights
rotate over copies that together do not fit into L2.

python -m benchmarks.kernels
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.errors import OutOfResources

from nanovllm.kernels.attention.interface import LayerCache
from nanovllm.kernels.layers import gemv
from nanovllm.kernels.layers.fused import FusedOps
from nanovllm.kernels.layers.linear import Around, Norm, linear
from nanovllm.kernels.layers.ops import LayerOps

HIDDEN, NUM, NUM_KV, DIM, INTERMEDIATE, VOCABULARY = 1024, 16, 8, 128, 3072, 151_936
EPS = 1e-6
DTYPE = torch.bfloat16
TOKENS = (1, 8, 64, 256, 512, 16384)
ROWS = (1, 2, 4, 8)
# Relative, ||out - expected|| / ||expected||.
TOLERANCE = 1e-2
# What the copies of a weight take together; an H200's L2 has 50 MB.
ROTATED_BYTES = 160 << 20
CALLS, REPLAYS = 24, 15
COMPILERS = 12


class Product(NamedTuple):
    """A matrix product of the model.

    Attributes:
        normed: its input is a residual stream, normalized.
        added: its output goes into the residual stream.
    """

    name: str
    inputs: int
    outputs: int
    normed: bool = False
    gated: bool = False
    added: bool = False


PRODUCTS = (
    Product("qkv", HIDDEN, (NUM + 2 * NUM_KV) * DIM, normed=True),
    Product("o_proj", NUM * DIM, HIDDEN, added=True),
    Product("gate_up", HIDDEN, INTERMEDIATE, normed=True, gated=True),
    Product("down", INTERMEDIATE, HIDDEN, added=True),
    Product("head", HIDDEN, VOCABULARY),
)


@click.command(help=__doc__)
def main() -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("it needs a GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    # Triton keeps what it has compiled on disk.
    with ProcessPoolExecutor(COMPILERS, get_context("spawn")) as pool:
        jobs = [
            pool.submit(compile_product, product, rows)
            for rows in sorted(ROWS, reverse=True)
            for product in PRODUCTS
        ]
        for job in jobs:
            job.result()
    # Graphs are captured on any stream but the default one.
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        wrong = time_ops() + time_products()
    if wrong:
        sys.exit("wrong: " + ", ".join(wrong))


def seconds_per_call(call: Callable[[int], object]) -> float:
    """Median over replays of a graph of `CALLS` calls, which get 0, 1, ... to choose copies by."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    for number in range(CALLS):
        call(number)
    graph.capture_end()
    times = []
    for _ in range(REPLAYS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / CALLS)
    return float(statistics.median(times[2:]))


def random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def is_wrong(found: Tensor, expected: Tensor) -> bool:
    found, expected = found.float(), expected.float()
    # Not greater, so that NaN is wrong.
    return not bool((found - expected).norm() <= TOLERANCE * expected.norm())


def time_ops() -> list[str]:
    """Prints the fused ops beside the plain ones; returns those that are wrong."""
    wrong = []
    print(f"\n{'op':<16}{'tokens':>8}{'plain µs':>10}{'fused µs':>10}{'GB/s':>7}")
    for tokens in TOKENS:
        for name, moved, op in _ops(tokens):
            plain, fused = partial(op, LayerOps()), partial(op, FusedOps())
            if any(map(is_wrong, fused(0), plain(0))):
                wrong.append(f"{name} of {tokens} tokens")
            slow, fast = seconds_per_call(plain), seconds_per_call(fused)
            row = f"{name:<16}{tokens:>8}{slow * 1e6:>10.2f}{fast * 1e6:>10.2f}"
            print(f"{row}{moved / fast / 1e9:>7.0f}", flush=True)
    return wrong


def _ops(tokens: int) -> Iterator[tuple[str, int, Callable[[LayerOps, int], tuple[Tensor, ...]]]]:
    """Each op's name, the bytes that it moves, and what gives its results."""
    x, residual = random(tokens, HIDDEN), random(tokens, HIDDEN)
    norm = Norm(random(HIDDEN), EPS)
    yield (
        "add_rms_norm",
        4 * x.nbytes,
        lambda ops, _: ops.add_rms_norm(x, residual, norm),
    )
    qkv = random(tokens, (NUM + 2 * NUM_KV) * DIM)
    norms = Norm(random(DIM), EPS), Norm(random(DIM), EPS)
    rotation = random(tokens, DIM, dtype=torch.float32)
    k, v = random(2, tokens // 256 + 1, 256, NUM_KV, DIM)
    slots = torch.randperm(len(k) * 256, device="cuda")[:tokens]

    caches = {type(ops): LayerCache(k.clone(), v.clone()) for ops in (LayerOps(), FusedOps())}

    def norm_rope_store(ops: LayerOps, _: int) -> tuple[Tensor, ...]:
        cache = caches[type(ops)]
        return ops.norm_rope_store(qkv, *norms, rotation, cache, slots), *cache

    yield "norm_rope_store", 2 * qkv.nbytes + rotation.nbytes, norm_rope_store
    gate_up = random(tokens, 2 * INTERMEDIATE)
    yield "silu_mul", gate_up.nbytes * 3 // 2, lambda ops, _: (ops.silu_mul(gate_up),)


class Inputs(NamedTuple):
    """Of a product.

    Attributes:
        weights: copies of one.
        stream: [rows, inputs], what x is added to before a norm.
        residual: [rows, outputs], what the output is added to.
    """

    x: Tensor
    weights: list[Tensor]
    norm: Norm
    stream: Tensor
    residual: Tensor

    @classmethod
    def of(cls, product: Product, rows: int, rotated_bytes: int) -> Inputs:
        shape = (1 + product.gated) * product.outputs, product.inputs
        weight = random(*shape) * product.inputs**-0.5
        return cls(
            x=random(rows, product.inputs),
            weights=[weight, *(weight.clone() for _ in range(rotated_bytes // weight.nbytes))],
            norm=Norm(random(product.inputs), EPS),
            stream=random(rows, product.inputs),
            residual=random(rows, product.outputs),
        )


def gemv_tunings(product: Product, rows: int) -> list[gemv.Tuning]:
    """Those whose tiles are not larger than the inputs, with at most 32 sums a thread."""
    padded = 1 << (rows - 1).bit_length()
    if padded > gemv.MAX_ROWS:
        return []
    return [
        gemv.Tuning(outputs, warps)
        for warps in (1, 2, 4, 8)
        for outputs in (1, 2, 4, 8)
        if 32 * warps * gemv.PER_LOAD <= product.inputs
        and padded * outputs * (1 + product.gated) <= 32
        and (outputs > 1 or product.gated)
    ]


class Way(NamedTuple):
    """A way to compute a product, and what is around it."""

    kind: str
    tuning: gemv.Tuning | None
    call: Callable[[int], Tensor]
    expected: Callable[[], Tensor]


def ways(product: Product, rows: int, inputs: Inputs) -> Iterator[Way]:
    """All that are to be timed. The residual stream's sum is part either of a product or of the
    norm that comes next, and is counted there."""
    x, weights, norm, stream, residual = inputs
    ops = FusedOps()
    fused = Around(
        norm if product.normed else None, product.gated, residual if product.added else None
    )
    apart = Around(gated=product.gated)

    def weight(number: int) -> Tensor:
        return weights[number % len(weights)]

    def normed() -> Tensor:
        return ops.add_rms_norm(x, stream, norm)[0] if product.normed else x

    def cublas(number: int) -> Tensor:
        out = F.linear(normed(), weight(number))
        return ops.silu_mul(out) if product.gated else out

    def expected() -> Tensor:
        return linear(normed(), weights[0], apart)

    yield Way("cublas", None, cublas, expected)
    for g in gemv_tunings(product, rows):
        yield Way(
            "gemv",
            g,
            lambda number, g=g: gemv.linear(x, weight(number), fused, g),  # type: ignore[misc]
            lambda: linear(x, weights[0], fused),
        )


def compile_product(product: Product, rows: int) -> None:
    for way in ways(product, rows, Inputs.of(product, rows, 0)):
        with contextlib.suppress(OutOfResources):
            way.call(0)
    torch.cuda.synchronize()


def time_products() -> list[str]:
    """Prints the best tunings beside cuBLAS; returns what is wrong."""
    wrong = []
    print("\nProducts with what is around them, in µs and GB/s; best tunings, outputs first")
    print(f"{'':<10}{'rows':>5}{'cublas':>9}{'gemv':>9}")
    for rows in ROWS:
        sums = {"cublas": 0.0, "gemv": 0.0}
        for product in PRODUCTS:
            inputs = Inputs.of(product, rows, ROTATED_BYTES)
            best: dict[str, tuple[float, Way]] = {}
            for way in ways(product, rows, inputs):
                try:
                    if is_wrong(way.call(0), way.expected()):
                        wrong.append(f"{product.name} of {rows} rows by {way.kind} {way.tuning}")
                    seconds = seconds_per_call(way.call)
                except OutOfResources:
                    continue
                if way.kind not in best or seconds < best[way.kind][0]:
                    best[way.kind] = seconds, way
            row, tunings = f"{product.name:<10}{rows:>5}", ""
            for kind in ("cublas", "gemv"):
                if kind not in best:
                    row += " " * 16
                    continue
                seconds, way = best[kind]
                row += f"{seconds * 1e6:>9.2f}"
                if way.tuning is not None:
                    row += f"{inputs.weights[0].nbytes / seconds / 1e9:>7.0f}"
                    tunings += f"  {kind} {tuple(way.tuning)}"
                if product.name != "head":
                    sums[kind] += seconds
            print(row + tunings, flush=True)
        totals = ", ".join(
            f"{kind} {seconds * 1e6:.1f}" for kind, seconds in sums.items() if seconds
        )
        print(f"all but the head of {rows} rows: {totals}\n")
    return wrong


if __name__ == "__main__":
    main()
