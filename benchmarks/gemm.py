"""A layer's GEMMs of a few rows on a GPU in bfloat16, with what is fused into them: `gemv` with the
tuning in use (if it is used) and with others, beside cuBLAS and the fused ops. `gemv` is checked
against the reference.

Calls are timed inside CUDA graphs, as decode steps run, gaps between kernels included. Weights
rotate over copies that together do not fit into L2.

python -m benchmarks.gemm --shape benchmarks/shapes/qwen3-8b.json
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
from benchmarks.support.help import help_of
from benchmarks.support.timing import ROTATED_BYTES, is_wrong, random, seconds_per_call
from nanovllm.kernels.layers import gemv
from nanovllm.kernels.layers.fused import FusedOps
from nanovllm.kernels.layers.gemv import GemvTuning
from nanovllm.kernels.layers.ops import Fusion, Norm, fused_linear

# Two and three rows run as four do.
ROWS = (1, 4)
COMPILERS = 14
# A GEMM's inputs are cut into at most this many tiles. They are unrolled, and more of them take
# minutes to compile.
MOST_TILES = 16
PER_LOAD = gemv.LOAD_BYTES // torch.bfloat16.itemsize
SHOWN = 3


class Gemm(NamedTuple):
    """A GEMM of a decoder layer.

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


def gemms(config: Qwen3Config) -> list[Gemm]:
    hidden, dim = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return [
        Gemm("qkv", hidden, (heads + 2 * kv_heads) * dim, normed=True),
        Gemm("o_proj", heads * dim, hidden, added=True),
        Gemm("gate_up", hidden, config.intermediate_size, normed=True, gated=True),
        Gemm("down", config.intermediate_size, hidden, added=True),
    ]


@click.command(help=help_of(__doc__))
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
            pool.submit(_compile, gemm, rows, tuning)
            for gemm in gemms(config)
            for rows in ROWS
            for tuning in tunings(gemm, rows)
        ]
        for job in jobs:
            job.result()
    wrong = []
    # Graphs are captured on any stream but the default one.
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        for rows in ROWS:
            print(f"\nrows: {rows}\n{'':<10}{'cuBLAS, µs':>12}{'ours, µs':>10}{'TB/s':>6}  best")
            for gemm in gemms(config):
                wrong += time_gemm(gemm, rows)
    if wrong:
        sys.exit("wrong: " + ", ".join(wrong))


class Inputs(NamedTuple):
    """The inputs of a GEMM.

    Attributes:
        weights: copies of one weight.
        stream: [rows, inputs], is added to x before a norm.
        residual: [rows, outputs], is added to the output.
    """

    x: Tensor
    weights: list[Tensor]
    norm: Norm
    stream: Tensor
    residual: Tensor

    @classmethod
    def of(cls, gemm: Gemm, rows: int, rotated_bytes: int) -> Inputs:
        shape = (1 + gemm.gated) * gemm.outputs, gemm.inputs
        weight = random(*shape) * gemm.inputs**-0.5
        return cls(
            x=random(rows, gemm.inputs),
            weights=[weight, *(weight.clone() for _ in range(rotated_bytes // weight.nbytes))],
            norm=Norm(random(gemm.inputs), EPS),
            stream=random(rows, gemm.inputs),
            residual=random(rows, gemm.outputs),
        )

    def fusion(self, gemm: Gemm) -> Fusion:
        return Fusion(
            self.norm if gemm.normed else None,
            gemm.gated,
            self.residual if gemm.added else None,
        )

    def weight(self, number: int) -> Tensor:
        return self.weights[number % len(self.weights)]


def tunings(gemm: Gemm, rows: int) -> list[GemvTuning]:
    """Tunings with at most 32 sums a thread, and the tuning in use."""
    in_use = tuning_in_use(gemm, rows)
    found = [
        GemvTuning(outputs, warps)
        for warps in (1, 2, 4, 8)
        for outputs in (1, 2, 4, 8)
        if gemm.inputs / MOST_TILES <= 32 * warps * PER_LOAD <= gemm.inputs
        and rows * outputs * (1 + gemm.gated) <= 32
        and (outputs > 1 or gemm.gated)
    ]
    return found if in_use is None or in_use in found else [in_use, *found]


def tuning_in_use(gemm: Gemm, rows: int) -> GemvTuning | None:
    return gemv.choose_tuning(rows, gemm.inputs, gemm.outputs, gemm.gated)


def by_gemv(gemm: Gemm, inputs: Inputs, tuning: GemvTuning) -> Callable[[int], Tensor]:
    fusion = inputs.fusion(gemm)
    return lambda number: gemv.linear(inputs.x, inputs.weight(number), fusion, tuning)


def by_cublas(gemm: Gemm, inputs: Inputs) -> Callable[[int], Tensor]:
    """Without the residual sum, which is part of the next norm and counted there."""
    ops = FusedOps()

    def call(number: int) -> Tensor:
        x = inputs.x
        if gemm.normed:
            x, _ = ops.add_rms_norm(x, inputs.stream, inputs.norm)
        out = F.linear(x, inputs.weight(number))
        return ops.silu_mul(out) if gemm.gated else out

    return call


def _compile(gemm: Gemm, rows: int, tuning: GemvTuning) -> None:
    with contextlib.suppress(OutOfResources):
        by_gemv(gemm, Inputs.of(gemm, rows, 0), tuning)(0)
    torch.cuda.synchronize()


def time_gemm(gemm: Gemm, rows: int) -> list[str]:
    """Prints a line; returns what is wrong."""
    inputs = Inputs.of(gemm, rows, ROTATED_BYTES)
    expected = fused_linear(inputs.x, inputs.weights[0], inputs.fusion(gemm))
    wrong, seconds = [], {}
    for tuning in tunings(gemm, rows):
        call = by_gemv(gemm, inputs, tuning)
        try:
            if is_wrong(call(0), expected):
                wrong.append(f"{gemm.name} of {rows} rows by {tuning}")
            seconds[tuning] = seconds_per_call(call)
        except OutOfResources:
            continue
    cublas = seconds_per_call(by_cublas(gemm, inputs))
    in_use = tuning_in_use(gemm, rows)
    ours = f"{'-':>10}{'':>6}"
    if in_use is not None:
        ours = f"{seconds[in_use] * 1e6:>10.1f}"
        ours += f"{inputs.weights[0].nbytes / seconds[in_use] / 1e12:>6.2f}"
    best = sorted(seconds.items(), key=lambda item: item[1])[:SHOWN]
    print(
        f"{gemm.name:<10}{cublas * 1e6:>12.1f}{ours}  "
        + ", ".join(f"{took * 1e6:.1f} {tuple(tuning)}" for tuning, took in best),
        flush=True,
    )
    return wrong


if __name__ == "__main__":
    main()
