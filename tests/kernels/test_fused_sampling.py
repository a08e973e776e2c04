"""The fused kernels draw the reference's tokens; on a CPU, in Triton's interpreter."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovllm.kernels.sampling import fused, reference
from nanovllm.kernels.sampling.reference import NOT_FINITE, SamplingTensors
from nanovllm.kernels.sampling.scan import DEFAULT_TUNING, SamplingTuning
from tests.kernels.drawn import KINDS, Row, count_other, fill_with, row_tensors

# The interpreter computes with numpy, which warns of infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
# So small that a few hundred tokens take several tiles and pages, and few are gathered.
SMALL = SamplingTuning(group=16, tile=4, programs=16, page=16, gather=4, candidates=32, pairs=16)


def of_rows(rows: list[Row], seed: int = 0) -> SamplingTensors:
    return row_tensors(rows, seed, DEVICE)


def random_logits(
    rows: int, vocab: int, scale: float = 3.0, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator, device=DEVICE) * scale
    return logits.to(dtype)


def check(logits: Tensor, params: SamplingTensors, tuning: SamplingTuning = SMALL) -> int:
    """How many tokens differ from the reference's; see `count_other`."""
    positions = torch.arange(len(logits), device=DEVICE) * 3 + 1
    found = fused.sample(logits, params, positions, tuning=tuning)
    assert found.dtype == torch.int64
    return count_other(found, logits, params, positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kind_of_row(dtype: torch.dtype) -> None:
    logits = random_logits(len(KINDS), 333, dtype=dtype)
    assert check(logits, of_rows(list(KINDS.values()))) == 0


@pytest.mark.parametrize("fill", ["equal", "rounded", "mostly -inf", "all -inf", "one finite"])
def test_ties_and_infinities(fill: str) -> None:
    logits = random_logits(len(KINDS), 201)
    fill_with(logits, fill, finite=77)
    # Sums of equal weights may well come to the very edge, see `check`.
    check(logits, of_rows(list(KINDS.values())))


@pytest.mark.parametrize(("value", "column"), [(torch.nan, 77), (torch.inf, 100)])
def test_rows_that_are_not_finite(value: float, column: int) -> None:
    logits = random_logits(len(KINDS), 101)
    params = of_rows(list(KINDS.values()))
    positions = torch.arange(len(KINDS), device=DEVICE)
    for sample in (partial(fused.sample, tuning=SMALL), reference.sample):
        expected = sample(logits, params, positions)
        assert (expected >= 0).all()
        for bad in (0, 1):
            damaged = logits.clone()
            damaged[bad::2, column] = value
            found = sample(damaged, params, positions)
            assert (found[bad::2] == NOT_FINITE).all()
            assert found[1 - bad :: 2].tolist() == expected[1 - bad :: 2].tolist()
        assert (sample(logits * 0 - torch.inf, params, positions) == NOT_FINITE).all()


def test_a_row_is_the_same_alone_and_in_any_batch() -> None:
    kinds = [KINDS[name] for name in ("greedy", "plain", "top-p", "all", "Qwen3's")]
    logits = random_logits(len(kinds), 300)
    params = of_rows(kinds)
    positions = torch.arange(len(kinds), device=DEVICE)
    together = fused.sample(logits, params, positions, tuning=SMALL)
    more = SMALL._replace(programs=64)
    assert torch.equal(fused.sample(logits, params, positions, tuning=more), together)
    for row in range(len(kinds)):
        part = slice(row, row + 1)
        alone = SamplingTensors(*(values[part] for values in params))
        token = fused.sample(logits[part], alone, positions[part], tuning=SMALL)
        assert token.item() == together[row].item()


def test_rows_that_are_not_to_be_drawn_are_not_read() -> None:
    """Rows at a negative position, without filters or at temperature 0."""
    kinds = [KINDS[name] for name in ("plain", "greedy with filters", "plain")]
    logits = random_logits(3, 333)
    positions = torch.tensor([5, -1, -1], device=DEVICE)
    expected = fused.sample(logits, of_rows(kinds), positions, tuning=SMALL)[0]
    logits[1:] = torch.inf
    found = fused.sample(logits, of_rows(kinds), positions, tuning=SMALL)
    assert found.tolist() == [expected.item(), NOT_FINITE, NOT_FINITE]


def test_padded_rows_and_none() -> None:
    padded = random_logits(5, 400)
    padded[:, 333:] = torch.inf
    params = of_rows(
        [KINDS["plain"], KINDS["greedy"], KINDS["all"], KINDS["top-p"], KINDS["min-p"]]
    )
    assert check(padded[:, :333], params) == 0
    none = SamplingTensors(*(values[:0] for values in params))
    assert fused.sample(padded[:0], none, none.seed).shape == (0,)


@settings(max_examples=30, deadline=None)
@given(
    row=st.tuples(
        st.one_of(st.just(0.0), st.floats(0.125, 5, width=32)),
        st.one_of(st.just(0), st.integers(1, 60), st.integers(1, 400)),
        st.one_of(st.just(1.0), st.floats(0.015625, 0.984375, width=32)),
        st.one_of(st.just(0.0), st.floats(0.0009765625, 0.984375, width=32)),
    ),
    vocab=st.sampled_from([1, 2, 16, 77, 256, 301]),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
    seed=st.integers(0, 10_000),
    rounded=st.booleans(),
)
def test_any_parameters(row: Row, vocab: int, scale: float, seed: int, rounded: bool) -> None:
    logits = random_logits(2, vocab, scale, seed=seed)
    check(logits.round() if rounded else logits, of_rows([row] * 2, seed))


@pytest.mark.skipif(not ON_CUDA, reason="the interpreter is too slow")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 32, 200, 512])
def test_a_whole_vocabulary(rows: int, dtype: torch.dtype) -> None:
    kinds = list(KINDS.values())
    for scale in (0.5, 3.0):
        for first in range(1 if rows > 100 else len(kinds)):
            logits = random_logits(rows, 151_936, scale, dtype, seed=first)
            params = of_rows([kinds[(first + row) % len(kinds)] for row in range(rows)], first)
            assert check(logits, params, DEFAULT_TUNING) <= 2 + rows // 50


@pytest.mark.skipif(not ON_CUDA, reason="needs CUDA graphs")
def test_captured_in_a_graph_it_follows_its_parameters() -> None:
    logits = random_logits(8, 151_936, dtype=torch.bfloat16)
    positions = torch.arange(8, device=DEVICE)
    params = of_rows([KINDS["plain"]] * 8)
    fused.sample(logits, params, positions)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fused.sample(logits, params, positions)
    for kind in KINDS.values():
        for held, new in zip(params, of_rows([kind] * 8), strict=True):
            held.copy_(new)
        graph.replay()
        assert torch.equal(found, fused.sample(logits, params, positions))
