"""Shortlists of the shards of a vocabulary give the tokens that the whole logits give: in plain
torch, and in Triton, on a CPU in its interpreter."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovllm.kernels.sampling import SHORTLIST_SIZE, fused, fused_shortlists, reference
from nanovllm.kernels.sampling.reference import NOT_FINITE, SamplingOps, SamplingTensors
from nanovllm.kernels.sampling.scan import DEFAULT_TUNING, SamplingTuning
from tests.kernels.drawn import BY_SHORTLISTS, Row, count_other, fill_with, row_tensors

# The interpreter computes with numpy, which warns of infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
ROWS = list(BY_SHORTLISTS.values())


def fused_ops(tuning: SamplingTuning) -> SamplingOps:
    return SamplingOps(
        partial(fused.sample, tuning=tuning),
        partial(fused_shortlists.shortlist, tuning=tuning),
        partial(fused_shortlists.sample_shortlists, tuning=tuning),
    )


PLAIN = SamplingOps(reference.sample, reference.shortlist, reference.sample_shortlists)
# So small that a few hundred tokens take several tiles and pages, and few are gathered: as many as
# a top-k may want.
FUSED = fused_ops(
    SamplingTuning(group=8, tile=8, programs=16, page=32, gather=8, candidates=64, pairs=64)
)
BOTH = pytest.mark.parametrize("ops", [PLAIN, FUSED], ids=["plain", "fused"])


def random_logits(rows: int, vocab: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator, device=DEVICE) * scale


def shortlists(
    ops: SamplingOps, logits: Tensor, params: SamplingTensors, positions: Tensor, shards: int
) -> list[Tensor]:
    """Of shards cut as a VocabParallelMatrix has them."""
    vocab = logits.shape[1]
    shard = -(-vocab // shards)
    padded = F.pad(logits, (0, shard * shards - vocab), value=-torch.inf)
    return [
        ops.shortlist(padded[:, first : first + shard], params, positions, first)
        for first in range(0, shard * shards, shard)
    ]


def check(ops: SamplingOps, logits: Tensor, params: SamplingTensors, shards: int) -> int:
    """How many tokens differ from the reference's; see `count_other`."""
    positions = torch.arange(len(logits), device=DEVICE) * 3 + 1
    sent = torch.cat(shortlists(ops, logits, params, positions, shards), dim=-1)
    found = ops.sample_shortlists(sent, params, positions)
    assert found.dtype == torch.int64
    return count_other(found, logits, params, positions)


@BOTH
def test_every_kind_of_row(ops: SamplingOps) -> None:
    logits = random_logits(len(ROWS), 501)
    params = row_tensors(ROWS, 0, DEVICE)
    for dtype, shards in ((torch.float32, 3), (torch.bfloat16, 2), (torch.float16, 8)):
        assert check(ops, logits.to(dtype), params, shards) == 0


@BOTH
@pytest.mark.parametrize(
    "fill", ["equal", "rounded", "mostly -inf", "all -inf", "one finite", "descending", "zeros"]
)
def test_ties_and_infinities(ops: SamplingOps, fill: str) -> None:
    logits = random_logits(len(ROWS), 301)
    fill_with(logits, fill, finite=277)
    if fill == "descending":  # the likeliest side by side
        logits = logits.sort(dim=-1, descending=True).values
    elif fill == "zeros":
        logits.clamp_(max=0).mul_(torch.where(torch.arange(301, device=DEVICE) % 2 == 0, 1, -1))
        logits.clamp_(max=0)
    # Sums of equal weights may well come to the very edge of top-p.
    check(ops, logits, row_tensors(ROWS, 0, DEVICE), 2)


@BOTH
@pytest.mark.parametrize(("value", "column"), [(torch.nan, 77), (torch.inf, 150)])
def test_rows_that_are_not_finite(ops: SamplingOps, value: float, column: int) -> None:
    logits = random_logits(len(ROWS), 151)
    params = row_tensors(ROWS, 0, DEVICE)
    positions = torch.arange(len(ROWS), device=DEVICE)

    def sample(of: Tensor) -> Tensor:
        sent = torch.cat(shortlists(ops, of, params, positions, 3), dim=-1)
        return ops.sample_shortlists(sent, params, positions)

    expected = sample(logits)
    assert (expected >= 0).all()
    for bad in (0, 1):
        damaged = logits.clone()
        damaged[bad::2, column] = value
        found = sample(damaged)
        assert (found[bad::2] == NOT_FINITE).all()
        assert found[1 - bad :: 2].tolist() == expected[1 - bad :: 2].tolist()
    assert (sample(logits * 0 - torch.inf) == NOT_FINITE).all()


@settings(max_examples=25, deadline=None)
@given(
    row=st.tuples(
        st.one_of(st.just(0.0), st.floats(0.125, 5, width=32)),
        st.integers(1, SHORTLIST_SIZE),
        st.one_of(st.just(1.0), st.floats(0.015625, 0.984375, width=32)),
        st.one_of(st.just(0.0), st.floats(0.0009765625, 0.984375, width=32)),
    ),
    vocab=st.sampled_from([1, 5, 64, 77, 301]),
    shards=st.sampled_from([1, 2, 3, 8]),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
    seed=st.integers(0, 10_000),
    rounded=st.booleans(),
)
def test_any_parameters(
    row: Row, vocab: int, shards: int, scale: float, seed: int, rounded: bool
) -> None:
    logits = random_logits(2, vocab, scale, seed=seed)
    params = row_tensors([row, (row[0], 0, 1.0, 0.0)], seed, DEVICE)
    for ops in (PLAIN, FUSED):
        check(ops, logits.round() if rounded else logits, params, shards)


@pytest.mark.parametrize("shape", ["random", "rounded", "equal"])
def test_both_make_the_same_shortlist(shape: str) -> None:
    logits = random_logits(len(ROWS), 300)
    logits = {"random": logits, "rounded": logits.round(), "equal": logits * 0 - 1}[shape]
    params = row_tensors(ROWS, 0, DEVICE)
    positions = torch.arange(len(ROWS), device=DEVICE)
    for plain, found in zip(
        *(shortlists(ops, logits, params, positions, 2) for ops in (PLAIN, FUSED)), strict=True
    ):
        assert torch.equal(found[:, SHORTLIST_SIZE:], plain[:, SHORTLIST_SIZE:])
        scores = (sent[:, :SHORTLIST_SIZE].view(torch.float32) for sent in (found, plain))
        torch.testing.assert_close(*scores, rtol=1e-6, atol=2e-6)


@BOTH
def test_no_rows(ops: SamplingOps) -> None:
    none = row_tensors([BY_SHORTLISTS["plain"]], 0, DEVICE)
    none = SamplingTensors(*(values[:0] for values in none))
    sent = ops.shortlist(random_logits(3, 50)[:0], none, none.seed, 0)
    assert ops.sample_shortlists(sent, none, none.seed).shape == (0,)


@pytest.mark.skipif(not ON_CUDA, reason="the interpreter is too slow")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 32, 512])
def test_shards_of_a_whole_vocabulary(rows: int, dtype: torch.dtype) -> None:
    """The tokens that the same kernels draw from whole logits: on one GPU all that ranks do but for
    their gathering."""
    ops = fused_ops(DEFAULT_TUNING)
    positions = torch.arange(rows, device=DEVICE)
    for first in range(len(ROWS) if rows == 1 else 1):
        params = row_tensors([ROWS[(first + row) % len(ROWS)] for row in range(rows)], 0, DEVICE)
        for scale in (0.5, 3.0):
            logits = random_logits(rows, 151_936, scale, seed=first).to(dtype)
            whole = ops.sample(logits, params, positions)
            for shards in (2, 4, 8):
                sent = torch.cat(shortlists(ops, logits, params, positions, shards), dim=-1)
                found = ops.sample_shortlists(sent, params, positions)
                # Sums of top-p may be rounded otherwise.
                assert int((found != whole).sum()) <= rows // 50
                assert count_other(found, logits, params, positions) <= 1 + rows // 50
        equal = torch.zeros(rows, 151_936, dtype=dtype, device=DEVICE)
        check(ops, equal, params, 4)


@pytest.mark.skipif(not ON_CUDA, reason="needs CUDA graphs")
def test_captured_in_a_graph_they_follow_their_parameters() -> None:
    logits = random_logits(8, 151_936).bfloat16()
    positions = torch.arange(8, device=DEVICE)
    params = row_tensors([BY_SHORTLISTS["plain"]] * 8, 0, DEVICE)
    ops = fused_ops(DEFAULT_TUNING)

    def draw() -> Tensor:
        sent = torch.cat(shortlists(ops, logits, params, positions, 4), dim=-1)
        return ops.sample_shortlists(sent, params, positions)

    draw()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = draw()
    for kind in ROWS:
        for held, new in zip(params, row_tensors([kind] * 8, 0, DEVICE), strict=True):
            held.copy_(new)
        graph.replay()
        assert torch.equal(found, draw())
