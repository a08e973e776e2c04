"""The kernels between a decoder layer's GEMMs on a GPU, at Qwen3-0.6B's shape in bfloat16.

Each is checked against its reference, and timed inside CUDA graphs, as decode steps run; gaps
between kernels are included.

python -m benchmarks.kernels
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import click
import torch
from torch import Tensor

from benchmarks.support.help import help_of
from benchmarks.support.timing import is_wrong, random, seconds_per_call
from nanovllm.kernels.attention.interface import LayerCache
from nanovllm.kernels.layers.fused import FusedOps
from nanovllm.kernels.layers.ops import Heads, LayerOps, Norm

HIDDEN, NUM, NUM_KV, DIM, INTERMEDIATE = 1024, 16, 8, 128, 3072
EPS = 1e-6
TOKENS = (1, 8, 64, 256, 512, 16384)


@click.command(help=help_of(__doc__))
def main() -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("it needs a GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    # Graphs are captured on any stream but the default one.
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        wrong = time_ops()
    if wrong:
        sys.exit("wrong: " + ", ".join(wrong))


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
    indices = torch.randperm(len(k) * 256, device="cuda")[:tokens]

    caches = {type(ops): LayerCache(k.clone(), v.clone()) for ops in (LayerOps(), FusedOps())}

    def norm_rope_store(ops: LayerOps, _: int) -> tuple[Tensor, ...]:
        cache = caches[type(ops)]
        return ops.norm_rope_store(Heads(qkv, *norms, rotation, cache, indices)), *cache

    yield "norm_rope_store", 2 * qkv.nbytes + rotation.nbytes, norm_rope_store
    gate_up = random(tokens, 2 * INTERMEDIATE)
    yield "silu_mul", gate_up.nbytes * 3 // 2, lambda ops, _: (ops.silu_mul(gate_up),)


if __name__ == "__main__":
    main()
