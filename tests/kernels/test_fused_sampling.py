"""The fused kernels draw the reference's tokens; on a CPU, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovllm.kernels.sampling import fused, reference
from nanovllm.kernels.sampling.fused import Tuning
from nanovllm.kernels.sampling.reference import SamplingTensors, filter_mask, temper
from nanovllm.kernels.sampling.stream import exponential_noise, stream_keys

# The interpreter computes with numpy, which warns of infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
# So small that a few hundred tokens take several tiles and pages, and few are gathered.
SMALL = Tuning(group=16, tile=4, programs=16, page=16, gather=4, candidates=32, pairs=16)
# Sums are rounded otherwise than the reference's; the kernel's logarithms are good to 1e-6.
EDGE = 2e-5
NOISE = 1e-5

Row = tuple[float, int, float, float]
"""Temperature, top_k, top_p, min_p."""


def tensors(rows: list[Row], seed: int = 0) -> SamplingTensors:
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    return SamplingTensors(
        temperature=torch.tensor(temperature, dtype=torch.float32, device=DEVICE),
        top_k=torch.tensor(top_k, dtype=torch.int32, device=DEVICE),
        top_p=torch.tensor(top_p, dtype=torch.float32, device=DEVICE),
        min_p=torch.tensor(min_p, dtype=torch.float32, device=DEVICE),
        seed=torch.arange(seed, seed + len(rows), device=DEVICE) * 7919 - 5,
    )


def random_logits(
    rows: int, vocab: int, scale: float = 3.0, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator, device=DEVICE) * scale
    return logits.to(dtype)


def check(logits: Tensor, params: SamplingTensors, tuning: Tuning = SMALL) -> int:
    """That the tokens are the reference's, or differ for a reason that rounding explains: another
    token has as good a score with noise, or stands at the very edge of top-p or min-p. Returns how
    many differ."""
    positions = torch.arange(len(logits), device=DEVICE) * 3 + 1
    found = fused.sample(logits, params, positions, tuning)
    expected = reference.sample(logits, params, positions)
    assert found.dtype == torch.int64
    differ = (found != expected).nonzero().flatten()
    for row in differ.tolist():
        part = slice(row, row + 1)
        temperature, top_k, top_p, min_p, seed = (values[part, None] for values in params)
        assert temperature.item() > 0, "greedy"
        scores = temper(logits[part], temperature)
        tightened = filter_mask(scores, top_k, top_p * (1 - EDGE), min_p * (1 + EDGE))
        loosened = filter_mask(
            scores,
            top_k,
            torch.where(top_p < 1, (top_p * (1 + EDGE)).clamp_max(1 - EDGE / 9), 1),
            min_p * (1 - EDGE),
        )
        noise = exponential_noise(stream_keys(seed[0], positions[part]), logits.shape[1])
        noisy = (scores - noise.log())[0]
        token = int(found[row])
        assert loosened[0, token], "not kept"
        least = noisy.masked_fill(~tightened[0], -torch.inf).max()
        assert noisy[token] >= least - NOISE, "not the one that was drawn"
    return len(differ)


KINDS: dict[str, Row] = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "greedy with filters": (0.0, 5, 0.5, 0.1),
    "plain": (1.0, 0, 1.0, 0.0),
    "cold": (1e-12, 0, 1.0, 0.0),
    "top-k": (1.0, 20, 1.0, 0.0),
    "top-k of one": (3.0, 1, 1.0, 0.0),
    "top-k of many": (2.0, 150, 1.0, 0.0),
    "top-k of more than there are": (2.0, 1000, 1.0, 0.0),
    "top-p": (1.0, 0, 0.9, 0.0),
    "tiny top-p": (3.0, 0, 1e-6, 0.0),
    "small top-p": (1.0, 0, 0.3, 0.0),
    "min-p": (1.0, 0, 1.0, 0.05),
    "min-p of one": (3.0, 0, 1.0, 1.0),
    "small min-p": (2.0, 0, 1.0, 1e-4),
    "Qwen3's": (0.6, 20, 0.95, 0.0),
    "top-p of many top-k": (2.0, 150, 0.7, 0.0),
    "all": (1.5, 30, 0.9, 0.02),
    "all of many": (3.0, 200, 0.9, 0.001),
    "top-p, min-p": (1.5, 0, 0.9, 0.02),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kind_of_row(dtype: torch.dtype) -> None:
    logits = random_logits(len(KINDS), 333, dtype=dtype)
    assert check(logits, tensors(list(KINDS.values()))) == 0


@pytest.mark.parametrize("fill", ["equal", "rounded", "mostly -inf", "all -inf", "one finite"])
def test_ties_and_infinities(fill: str) -> None:
    logits = random_logits(len(KINDS), 201)
    if fill == "equal":
        logits.fill_(-2.5)
    elif fill == "rounded":
        logits.round_()
    elif fill == "mostly -inf":
        logits[logits < 4] = -torch.inf
    elif fill == "all -inf":
        logits.fill_(-torch.inf)
    else:
        logits[:, :77] = -torch.inf
        logits[:, 78:] = -torch.inf
    # Sums of equal weights may well come to the very edge, see `check`.
    check(logits, tensors(list(KINDS.values())))


def test_a_row_is_the_same_alone_and_in_any_batch() -> None:
    kinds = [KINDS[name] for name in ("greedy", "plain", "top-p", "all", "Qwen3's")]
    logits = random_logits(len(kinds), 300)
    params = tensors(kinds)
    positions = torch.arange(len(kinds), device=DEVICE)
    together = fused.sample(logits, params, positions, SMALL)
    more = SMALL._replace(programs=64)
    assert torch.equal(fused.sample(logits, params, positions, more), together)
    for row in range(len(kinds)):
        part = slice(row, row + 1)
        alone = SamplingTensors(*(values[part] for values in params))
        token = fused.sample(logits[part], alone, positions[part], SMALL)
        assert token.item() == together[row].item()


def test_padded_rows_and_none() -> None:
    padded = random_logits(5, 400)
    padded[:, 333:] = torch.inf
    params = tensors(
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
    check(logits.round() if rounded else logits, tensors([row] * 2, seed))


@pytest.mark.skipif(not ON_CUDA, reason="the interpreter is too slow")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 32, 200, 512])
def test_a_whole_vocabulary(rows: int, dtype: torch.dtype) -> None:
    kinds = list(KINDS.values())
    for scale in (0.5, 3.0):
        for first in range(1 if rows > 100 else len(kinds)):
            logits = random_logits(rows, 151_936, scale, dtype, seed=first)
            params = tensors([kinds[(first + row) % len(kinds)] for row in range(rows)], first)
            assert check(logits, params, fused.DEFAULT_TUNING) <= 2 + rows // 50


@pytest.mark.skipif(not ON_CUDA, reason="needs CUDA graphs")
def test_captured_in_a_graph_it_follows_its_parameters() -> None:
    logits = random_logits(8, 151_936, dtype=torch.bfloat16)
    positions = torch.arange(8, device=DEVICE)
    params = tensors([KINDS["plain"]] * 8)
    fused.sample(logits, params, positions)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fused.sample(logits, params, positions)
    for kind in KINDS.values():
        for held, new in zip(params, tensors([kind] * 8), strict=True):
            held.copy_(new)
        graph.replay()
        assert torch.equal(found, fused.sample(logits, params, positions))
