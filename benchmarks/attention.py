"""Attention over a paged cache on a GPU, at Qwen3-0.6B's shape in bfloat16: our kernels, beside
flash-attn where it is installed. Each is checked against the reference and timed.

Calls are timed inside CUDA graphs. The cache rotates over copies that together do not fit into L2,
as the caches of a model's layers do not.

python -m benchmarks.attention
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import click
import numpy as np
import torch
from torch import Tensor

from benchmarks.kernels import DIM, NUM, NUM_KV
from benchmarks.support.bandwidth import copy_bandwidth
from benchmarks.support.help import help_of
from benchmarks.support.timing import ROTATED_BYTES, TOLERANCE, random, seconds_per_call
from nanovllm.kernels.attention.interface import (
    AttentionBackend,
    AttentionMetadata,
    AttentionShape,
    LayerCache,
)
from nanovllm.kernels.attention.sdpa import SdpaBackend
from nanovllm.kernels.attention.triton_decode import TritonDecodeBackend
from nanovllm.kernels.attention.triton_prefill import TritonPrefillBackend
from nanovllm.kernels.attention.tuning import (
    DecodeTuning,
    Gpu,
    PrefillTuning,
    choose_prefill_tuning,
)

SHAPE = AttentionShape(NUM, NUM_KV, DIM, 256)
# The bounds of a captured step.
CHUNK_ROWS = 32
MAX_MODEL_LEN = 8192
COMPILERS = 12
MOST_COPIES = 8


class Case(NamedTuple):
    """Sequences with `queries` tokens at the end of `contexts`.

    Attributes:
        captured: as in a captured step there are padding rows, and lengths on the host are bounds.
    """

    name: str
    queries: Sequence[int]
    contexts: Sequence[int]
    captured: bool = False

    @property
    def operations(self) -> int:
        """Floating-point operations of both GEMMs, without what causality masks."""
        pairs = sum(
            q * (context - q) + q * (q + 1) // 2
            for q, context in zip(self.queries, self.contexts, strict=True)
        )
        return 4 * NUM * DIM * pairs

    @property
    def cache_bytes(self) -> int:
        return sum(self.contexts) * 2 * 2 * NUM_KV * DIM


PREFILLS = (
    Case("128 after 7872", [128], [8000]),
    Case("512 after 7488", [512], [8000]),
    Case("512 after 7488, captured", [512], [8000], captured=True),
    Case("1024 after 6976", [1024], [8000]),
    Case("2048 after 5952", [2048], [8000]),
    Case("2048 after 5952, captured", [2048], [8000], captured=True),
    Case("2048", [2048], [2048]),
    Case("8 x 256", [256] * 8, [256] * 8),
    Case("16 x 1024", [1024] * 16, [1024] * 16),
)
_RAGGED = np.random.default_rng(0).integers(100, 2100, 256).tolist()
DECODES = (
    *(
        Case(f"{rows} x {context}", [1] * rows, [context] * rows)
        for rows, context in ((1, 1024), (1, 8000), (8, 1024), (32, 1024), (64, 1024), (256, 1024))
    ),
    Case("256 x 100..2100", [1] * 256, _RAGGED),
)
# With split contexts, and without.
PREFILLS_TO_COMPILE = (PREFILLS[0], PREFILLS[-1])
DECODES_TO_COMPILE = (DECODES[0], DECODES[-1])

PREFILL_SWEEP = (
    PrefillTuning(128, 128, warps=8, stages=2, programs=1),
    PrefillTuning(128, 128, warps=8, stages=3, programs=1),
    PrefillTuning(128, 128, warps=8, stages=2, programs=1, descriptors=False),
    PrefillTuning(128, 64, warps=8, stages=2, programs=1),
    PrefillTuning(128, 64, warps=8, stages=3, programs=1),
    PrefillTuning(128, 64, warps=8, stages=3, programs=1, descriptors=False),
    PrefillTuning(128, 64, warps=4, stages=2, programs=2),
    PrefillTuning(128, 64, warps=4, stages=2, programs=2, descriptors=False),
    PrefillTuning(128, 32, warps=4, stages=3, programs=2),
    PrefillTuning(64, 64, warps=4, stages=2, programs=2),
    PrefillTuning(64, 64, warps=4, stages=3, programs=2),
    PrefillTuning(64, 64, warps=4, stages=2, programs=2, descriptors=False),
)
DECODE_SWEEP = (
    DecodeTuning(),
    DecodeTuning(tile=128, warps=4, stages=3),
    DecodeTuning(tile=128, warps=4, stages=2),
    DecodeTuning(tile=64, warps=4, stages=3),
    DecodeTuning(tile=128, warps=8, stages=2),
)


class Candidate(NamedTuple):
    """A backend, and its name in the table."""

    name: str
    make: Callable[[], AttentionBackend]


@click.command(help=help_of(__doc__))
@click.option("--sweep", is_flag=True, help="Try many tunings, not only the one in use.")
def main(sweep: bool) -> None:
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copies {bandwidth:.3g} B/s")
    # Triton keeps what it has compiled on disk.
    with ProcessPoolExecutor(COMPILERS, get_context("spawn")) as pool:
        jobs = [
            pool.submit(_compile, case, number, sweep)
            for case in (*PREFILLS_TO_COMPILE, *DECODES_TO_COMPILE)
            for number in range(len(_candidates(case, sweep)))
        ]
        for job in jobs:
            job.result()
    # Graphs are captured on any stream but the default one.
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        wrong = list(time_all("prefill", PREFILLS, prefill_candidates(sweep), bandwidth))
        wrong += time_all("decode", DECODES, decode_candidates(sweep), bandwidth)
    if wrong:
        sys.exit("wrong: " + ", ".join(wrong))


def prefill_candidates(sweep: bool) -> list[Candidate]:
    gpu = Gpu.current()
    tunings = PREFILL_SWEEP if sweep else [choose_prefill_tuning(DIM, torch.bfloat16, gpu)]
    return [
        Candidate(str(tuple(tuning)), lambda t=tuning: TritonPrefillBackend(SHAPE, t))  # type: ignore[misc]
        for tuning in tunings
    ]


def decode_candidates(sweep: bool) -> list[Candidate]:
    return [
        Candidate(str(tuple(tuning)), lambda t=tuning: TritonDecodeBackend(SHAPE, t))  # type: ignore[misc]
        for tuning in (DECODE_SWEEP if sweep else DECODE_SWEEP[:1])
    ]


def flash_candidate(phase: str) -> list[Candidate]:
    if importlib.util.find_spec("flash_attn") is None:
        return []
    from nanovllm.kernels.attention import flash

    backend = flash.FlashPrefillBackend if phase == "prefill" else flash.FlashDecodeBackend
    return [Candidate("flash-attn", lambda: backend(SHAPE))]


class Inputs(NamedTuple):
    """The inputs of a case; `caches` are copies of one cache, and `exact` has exact lengths."""

    q: Tensor
    caches: list[LayerCache]
    metadata: AttentionMetadata
    exact: AttentionMetadata

    @classmethod
    def of(cls, case: Case, rotated_bytes: int) -> Inputs:
        rows = len(case.queries)
        most = -(-max(case.contexts) // SHAPE.block_size)
        table = torch.randperm(rows * most, device="cuda").int().view(rows, most)
        size = (rows * most, SHAPE.block_size, NUM_KV, DIM)
        cache = LayerCache(random(*size), random(*size))
        copies = min(MOST_COPIES, rotated_bytes // (2 * cache.k.nbytes))
        exact = _metadata(case.queries, case.contexts, table)
        metadata = exact
        if case.captured:
            spare = [0] * (CHUNK_ROWS - rows)
            padded = torch.zeros(CHUNK_ROWS, MAX_MODEL_LEN // SHAPE.block_size).cuda().int()
            padded[:rows, :most] = table
            metadata = _metadata([*case.queries, *spare], [*case.contexts, *spare], padded)
            metadata.query_lens[:] = sum(case.queries)
            metadata.context_lens[:] = MAX_MODEL_LEN
        caches = [cache, *(LayerCache(cache.k.clone(), cache.v.clone()) for _ in range(copies))]
        return cls(random(sum(case.queries), NUM, DIM), caches, metadata, exact)


def _metadata(
    queries: Sequence[int], contexts: Sequence[int], block_tables: Tensor
) -> AttentionMetadata:
    starts = np.concatenate(([0], np.cumsum(queries)))
    return AttentionMetadata(
        num_decodes=sum(q == 1 for q in queries),
        query_lens=np.array(queries, dtype=np.int32),
        context_lens=np.array(contexts, dtype=np.int32),
        cu_seqlens_q=torch.tensor(starts, dtype=torch.int32, device="cuda"),
        cache_seqlens=torch.tensor(contexts, dtype=torch.int32, device="cuda"),
        block_tables=block_tables,
    )


def _candidates(case: Case, sweep: bool) -> list[Candidate]:
    return decode_candidates(sweep) if case in DECODES else prefill_candidates(sweep)


def _compile(case: Case, number: int, sweep: bool) -> None:
    inputs = Inputs.of(case, 0)
    # What fails is reported where it is timed.
    with contextlib.suppress(Exception):
        batch = _candidates(case, sweep)[number].make().prepare(inputs.metadata)
        batch.forward(inputs.q, inputs.caches[0])
        torch.cuda.synchronize()


def time_all(
    phase: str, cases: Sequence[Case], ours: Sequence[Candidate], bandwidth: float
) -> Iterator[str]:
    """Prints a line for each case; yields the wrong results' names."""
    candidates = [*flash_candidate(phase), *ours]
    measure = "TFLOP/s" if phase == "prefill" else "times the floor: reading keys and values once"
    print(f"\n{phase}: µs, {measure}, relative error")
    for number, candidate in enumerate(candidates):
        print(f"  [{number}] {candidate.name}")
    for case in cases:
        inputs = Inputs.of(case, ROTATED_BYTES)
        expected = SdpaBackend(SHAPE).prepare(inputs.exact).forward(inputs.q, inputs.caches[0])
        print(f"{case.name:<28}", end="", flush=True)
        for number, candidate in enumerate(candidates):
            try:
                seconds, error = _time(candidate, inputs, expected)
            except Exception as problem:  # a tuning that this GPU has no room for, say
                print(f"  [{number}] - ({type(problem).__name__})", end="", flush=True)
                continue
            if phase == "prefill":
                rate = f"{case.operations / seconds / 1e12:.0f}"
            else:
                rate = f"{seconds / (case.cache_bytes / bandwidth):.2f}"
            print(f"  [{number}] {seconds * 1e6:.1f} {rate} {error:.4f}", end="", flush=True)
            if not error <= TOLERANCE:
                yield f"{phase} {case.name} by {candidate.name}"
        print(flush=True)


def _time(candidate: Candidate, inputs: Inputs, expected: Tensor) -> tuple[float, float]:
    """Seconds a call, and the relative error ||out - expected|| / ||expected||."""
    batch = candidate.make().prepare(inputs.metadata)
    found = batch.forward(inputs.q, inputs.caches[0]).float()
    error = (found - expected.float()).norm() / expected.float().norm()
    seconds = seconds_per_call(
        lambda number: batch.forward(inputs.q, inputs.caches[number % len(inputs.caches)])
    )
    return seconds, float(error)


if __name__ == "__main__":
    main()
