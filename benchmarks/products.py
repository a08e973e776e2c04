"""A layer's matrix products of a few rows on a GPU in bfloat16, with what is around them: `gemv`,
as it is tuned (if it is used) and with other tunings, beside cuBLAS and the fused ops. `gemv` is
checked against the reference.

Calls are timed inside CUDA graphs, as decode steps run, gaps between kernels included. Weights
rotate over copies that together do not fit into L2.

python -m benchmarks.products --shape benchmarks/shapes/qwen3-8b.json
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3Config
from triton.runtime.errors import OutOfResources

from benchmarks.kernels import EPS
from benchmarks.support.timing import ROTATED_BYTES, is_wrong, random, seconds_per_call
from nanovllm.kernels.layers import gemv
from nanovllm.kernels.layers.fused import FusedOps
from nanovllm.kernels.layers.linear import Around, Norm, linear

# Two and three rows run as four do.
ROWS = (1, 4)
COMPILERS = 14
# Of a product's inputs: they are unrolled, and more of them take minutes to compile.
MOST_TILES = 16
SHOWN = 3


class Product(NamedTuple):
    """A matrix product of a decoder layer.

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


def products(config: Qwen3Config) -> list[Product]:
    hidden, dim = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return [
        Product("qkv", hidden, (heads + 2 * kv_heads) * dim, normed=True),
        Product("o_proj", heads * dim, hidden, added=True),
        Product("gate_up", hidden, config.intermediate_size, normed=True, gated=True),
        Product("down", config.intermediate_size, hidden, added=True),
    ]


@click.command(help=__doc__)
@click.option(
    "--shape",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=Path(__file__).parent / "shapes" / "qwen3-0.6b.json",
    help="The config.json of a model.  [default: Qwen3-0.6B's]",
)
def main(shape: Path) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("it needs a GPU")
    config = Qwen3Config.from_json_file(str(shape))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {shape.stem}")
    # Triton keeps what it has compiled on disk.
    with ProcessPoolExecutor(COMPILERS, get_context("spawn")) as pool:
        jobs = [
            pool.submit(_compile, product, rows, tuning)
            for product in products(config)
            for rows in ROWS
            for tuning in tunings(product, rows)
        ]
        for job in jobs:
            job.result()
    wrong = []
    # Graphs are captured on any stream but the default one.
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        for rows in ROWS:
            print(f"\nrows: {rows}\n{'':<10}{'cuBLAS, µs':>12}{'ours, µs':>10}{'TB/s':>6}  best")
            for product in products(config):
                wrong += time_product(product, rows)
    if wrong:
        sys.exit("wrong: " + ", ".join(wrong))


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

    def around(self, product: Product) -> Around:
        return Around(
            self.norm if product.normed else None,
            product.gated,
            self.residual if product.added else None,
        )

    def weight(self, number: int) -> Tensor:
        return self.weights[number % len(self.weights)]


def tunings(product: Product, rows: int) -> list[gemv.Tuning]:
    """Those with at most 32 sums a thread, and the one in use."""
    in_use = tuning_in_use(product, rows)
    found = [
        gemv.Tuning(outputs, warps)
        for warps in (1, 2, 4, 8)
        for outputs in (1, 2, 4, 8)
        if product.inputs / MOST_TILES <= 32 * warps * gemv.PER_LOAD <= product.inputs
        and rows * outputs * (1 + product.gated) <= 32
        and (outputs > 1 or product.gated)
    ]
    return found if in_use is None or in_use in found else [in_use, *found]


def tuning_in_use(product: Product, rows: int) -> gemv.Tuning | None:
    return gemv.choose_tuning(rows, product.inputs, product.outputs, product.gated)


def by_gemv(product: Product, inputs: Inputs, tuning: gemv.Tuning) -> Callable[[int], Tensor]:
    around = inputs.around(product)
    return lambda number: gemv.linear(inputs.x, inputs.weight(number), around, tuning)


def by_cublas(product: Product, inputs: Inputs) -> Callable[[int], Tensor]:
    """The residual stream's sum is part of the norm that comes next, and is counted there."""
    ops = FusedOps()

    def call(number: int) -> Tensor:
        x = inputs.x
        if product.normed:
            x, _ = ops.add_rms_norm(x, inputs.stream, inputs.norm)
        out = F.linear(x, inputs.weight(number))
        return ops.silu_mul(out) if product.gated else out

    return call


def _compile(product: Product, rows: int, tuning: gemv.Tuning) -> None:
    with contextlib.suppress(OutOfResources):
        by_gemv(product, Inputs.of(product, rows, 0), tuning)(0)
    torch.cuda.synchronize()


def time_product(product: Product, rows: int) -> list[str]:
    """Prints a line; returns what is wrong."""
    inputs = Inputs.of(product, rows, ROTATED_BYTES)
    expected = linear(inputs.x, inputs.weights[0], inputs.around(product))
    wrong, seconds = [], {}
    for tuning in tunings(product, rows):
        call = by_gemv(product, inputs, tuning)
        try:
            if is_wrong(call(0), expected):
                wrong.append(f"{product.name} of {rows} rows by {tuning}")
            seconds[tuning] = seconds_per_call(call)
        except OutOfResources:
            continue
    cublas = seconds_per_call(by_cublas(product, inputs))
    in_use = tuning_in_use(product, rows)
    ours = f"{'-':>10}{'':>6}"
    if in_use is not None:
        ours = f"{seconds[in_use] * 1e6:>10.1f}"
        ours += f"{inputs.weights[0].nbytes / seconds[in_use] / 1e12:>6.2f}"
    best = sorted(seconds.items(), key=lambda item: item[1])[:SHOWN]
    print(
        f"{product.name:<10}{cublas * 1e6:>12.1f}{ours}  "
        + ", ".join(f"{took * 1e6:.1f} {tuple(tuning)}" for tuning, took in best),
        flush=True,
    )
    return wrong


if __name__ == "__main__":
    main()
