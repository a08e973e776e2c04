"""Sampling: the right distribution, from numbers that depend on nothing but their key."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from nanovllm.kernels.sampling import random_stream, reference
from nanovllm.kernels.sampling.random_stream import exponential_noise, stream_keys, token_bits
from nanovllm.kernels.sampling.reference import SamplingTensors, filter_mask, sample
from nanovllm.services.gpu_worker.model.parallel import TensorParallel, VocabShard
from nanovllm.services.gpu_worker.sampling import logprobs

VOCAB = 301
TOKENS = torch.arange(VOCAB, dtype=torch.int32)


def parameters(
    rows: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seeds: Tensor | None = None,
) -> SamplingTensors:
    return SamplingTensors(
        temperature=torch.full((rows,), temperature),
        top_k=torch.full((rows,), top_k, dtype=torch.int32),
        top_p=torch.full((rows,), top_p),
        min_p=torch.full((rows,), min_p),
        seed=torch.arange(rows) if seeds is None else seeds,
    )


def joined(parts: list[SamplingTensors]) -> SamplingTensors:
    return SamplingTensors(
        temperature=torch.cat([part.temperature for part in parts]),
        top_k=torch.cat([part.top_k for part in parts]),
        top_p=torch.cat([part.top_p for part in parts]),
        min_p=torch.cat([part.min_p for part in parts]),
        seed=torch.cat([part.seed for part in parts]),
    )


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def chi_square(counts: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """The statistic's distance from its mean in standard deviations, bins with few merged."""
    expected = probabilities * counts.sum()
    rare = expected < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    present = wanted > 0
    assert observed[~present].sum() == 0
    statistic = ((observed - wanted)[present] ** 2 / wanted[present]).sum()
    freedom = present.sum() - 1
    return float((statistic - freedom) / np.sqrt(2 * freedom))


# The random stream --------------------------------------------------------------------------------


def numpy_keys(seeds: list[int], positions: list[int]) -> list[int]:
    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    return [mix(mix(seed % 2**64) + at) for seed, at in zip(seeds, positions, strict=True)]


def numpy_bits(key: int, tokens: NDArray[np.uint32]) -> NDArray[np.uint32]:
    x = tokens ^ np.uint32(key % 2**32)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x21F0AAAD)
    x ^= np.uint32(key >> 32)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0xD35A2D97)
    x ^= x >> np.uint32(15)
    return x


INT64 = st.integers(-(2**63), 2**63 - 1)


@given(pairs=st.lists(st.tuples(INT64, st.integers(0, 2**31)), min_size=1, max_size=5))
def test_the_stream_is_the_same_in_unsigned_arithmetic(pairs: list[tuple[int, int]]) -> None:
    seeds, positions = [seed for seed, _ in pairs], [position for _, position in pairs]
    keys = stream_keys(torch.tensor(seeds), torch.tensor(positions))
    wanted = numpy_keys(seeds, positions)
    assert [key % 2**64 for key in keys.tolist()] == wanted
    bits = token_bits(keys, TOKENS).numpy().view(np.uint32)
    tokens = np.arange(VOCAB, dtype=np.uint32)
    for found, key in zip(bits, wanted, strict=True):
        assert np.array_equal(found, numpy_bits(key, tokens))


def test_noise_of_a_token_depends_on_key_and_token_alone() -> None:
    keys = stream_keys(torch.arange(7), torch.arange(7) * 100)
    whole = exponential_noise(keys, VOCAB)
    assert torch.equal(exponential_noise(keys[3:4], VOCAB)[0], whole[3])
    assert torch.equal(exponential_noise(keys, 100, first=150), whole[:, 150:250])


def test_noise_is_exponential_down_to_its_tail() -> None:
    keys = stream_keys(torch.arange(400), torch.zeros(400, dtype=torch.int64))
    noise = exponential_noise(keys, 20_000).flatten()
    assert noise.min() > 0
    assert noise.isfinite().all()
    for threshold in (1e-6, 1e-5, 1e-3, 0.1, 1.0, 5.0, 10.0):
        probability = -np.expm1(-threshold)
        expected = probability * len(noise)
        found = int((noise < threshold).sum())
        deviation = (expected * (1 - probability)) ** 0.5
        assert abs(found - expected) < 4 * deviation + 1


def test_the_extremes_of_the_bits_give_finite_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = torch.tensor([[0, -1, 2**31 - 1, -(2**31)]], dtype=torch.int32)
    monkeypatch.setattr(random_stream, "token_bits", lambda *_: extremes.clone())
    noise = exponential_noise(torch.zeros(1, dtype=torch.int64), 4)
    assert noise.log().isfinite().all()
    assert noise.tolist()[0] == pytest.approx([2**-32, 24 * np.log(2), 24 * np.log(2), 2**-32])


@pytest.mark.parametrize("by", ["position", "seed"])
def test_streams_of_neighbours_are_independent(by: str) -> None:
    steps = torch.arange(2000)
    zeros = torch.zeros_like(steps)
    keys = stream_keys(zeros, steps) if by == "position" else stream_keys(steps, zeros)
    uniform = (-exponential_noise(keys, 500)).expm1().double() + 0.5  # centred at 0
    samples = (len(steps) - 1) * 500
    for shift in (1, 2, 64):
        for product in (
            uniform[shift:] * uniform[:-shift],  # the same token, neighbouring keys
            uniform[:, shift:] * uniform[:, :-shift],  # neighbouring tokens, the same key
            uniform[shift:, shift:] * uniform[:-shift, :-shift],
        ):
            assert abs(product.mean().item()) * 12 * samples**0.5 < 4.5
    # Every bit is as often set as not, and flips half the time from one key to the next.
    bits = token_bits(keys, torch.arange(500, dtype=torch.int32)).numpy().view(np.uint32)
    for words in (bits, bits[1:] ^ bits[:-1], bits[:, 1:] ^ bits[:, :-1]):
        for bit in range(32):
            share = ((words >> np.uint32(bit)) & 1).mean()
            assert abs(share - 0.5) * 2 * words.size**0.5 < 5


# Sampling -----------------------------------------------------------------------------------------


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, [7, 200]] = 3.0
    logits[2, 300] = -torch.finfo(torch.float32).tiny
    positions = torch.arange(3)
    assert sample(logits, parameters(3, temperature=0), positions).tolist() == [0, 7, 0]
    mixed = joined([parameters(3, temperature=0), parameters(3)])
    both = sample(logits.repeat(2, 1), mixed, positions.repeat(2))
    assert both[:3].tolist() == [0, 7, 0]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("by", ["position", "seed"])
def test_samples_follow_the_softmax(temperature: float, by: str) -> None:
    rows = 40_000
    logits = random_logits(1)
    zeros = torch.zeros(rows, dtype=torch.int64)
    steps = torch.arange(rows)
    seeds, positions = (zeros, steps) if by == "position" else (steps, zeros)
    sampled = sample(logits.expand(rows, -1), parameters(rows, temperature, seeds=seeds), positions)
    counts = np.bincount(sampled.numpy(), minlength=VOCAB)
    probabilities = (logits[0].double() / temperature).softmax(-1).numpy()
    assert abs(chi_square(counts, probabilities)) < 4


def test_filtered_samples_follow_the_renormalized_distribution() -> None:
    rows = 20_000
    logits = random_logits(1)
    params = parameters(rows, 0.8, top_k=20, top_p=0.9, min_p=0.02, seeds=torch.zeros(rows).long())
    sampled = sample(logits.expand(rows, -1), params, torch.arange(rows))
    kept = numpy_filter((logits[0] / 0.8).numpy(), 20, 0.9, 0.02)
    probabilities = np.where(kept, (logits[0].double() / 0.8).softmax(-1).numpy(), 0)
    counts = np.bincount(sampled.numpy(), minlength=VOCAB)
    assert abs(chi_square(counts, probabilities / probabilities.sum())) < 4


def test_successive_samples_are_independent() -> None:
    rows = 40_000
    logits = torch.zeros(rows, 8)
    sampled = sample(
        logits, parameters(rows, seeds=torch.full((rows,), 5)), torch.arange(rows)
    ).numpy()
    pairs = np.bincount(sampled[1:] * 8 + sampled[:-1], minlength=64)
    assert abs(chi_square(pairs, np.full(64, 1 / 64))) < 4


def numpy_filter(
    scores: NDArray[np.float32], top_k: int, top_p: float, min_p: float
) -> NDArray[np.bool_]:
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    order = order[:top_k] if top_k else order
    weights = np.exp(scores[order].astype(np.float64) - scores[order[0]])
    weights /= weights.sum()
    kept = np.zeros(len(scores), dtype=bool)
    total = 0.0
    for token, weight in zip(order, weights, strict=True):
        if total >= top_p and top_p < 1:
            break
        total += weight
        kept[token] = weight >= min_p * weights[0]
    return kept


@settings(max_examples=200)
@given(
    seed=st.integers(0, 1000),
    ties=st.booleans(),
    top_k=st.one_of(st.just(0), st.integers(1, 400)),
    top_p=st.one_of(st.just(1.0), st.floats(1 / 64, 63 / 64, width=32)),
    min_p=st.one_of(st.just(0.0), st.just(1.0), st.floats(1 / 64, 63 / 64, width=32)),
)
def test_filters_equal_a_plain_reference(
    seed: int, ties: bool, top_k: int, top_p: float, min_p: float
) -> None:
    scores = random_logits(1, seed=seed)
    if ties:
        scores = scores.round()
    found = filter_mask(
        scores, torch.tensor([[top_k]]), torch.tensor([[top_p]]), torch.tensor([[min_p]])
    )[0].numpy()
    wanted = numpy_filter(scores[0].numpy(), top_k, top_p, min_p)
    assert found.any()
    if np.array_equal(found, wanted):
        return
    # Only a token at the very edge of top-p or min-p may fall otherwise, by rounding.
    lower = numpy_filter(scores[0].numpy(), top_k, top_p * (1 - 1e-5), min_p + 1e-5 * (min_p > 0))
    upper = numpy_filter(
        scores[0].numpy(), top_k, min(1.0, top_p * (1 + 1e-5)), max(0.0, min_p - 1e-5)
    )
    assert (found >= lower).all()
    assert (found <= upper).all()


def test_top_k_of_one_and_a_tiny_top_p_are_greedy() -> None:
    logits = random_logits(50)
    greedy = logits.argmax(-1)
    positions = torch.arange(50)
    assert torch.equal(sample(logits, parameters(50, 5.0, top_k=1), positions), greedy)
    assert torch.equal(sample(logits, parameters(50, 5.0, top_p=1e-6), positions), greedy)
    assert torch.equal(sample(logits, parameters(50, 5.0, min_p=1.0), positions), greedy)


def test_a_row_is_the_same_alone_and_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [
        parameters(5, 0.7),
        parameters(5, 0.0),
        parameters(5, 1.3, top_k=7),
        parameters(5, 1.0, top_p=0.6),
        parameters(5, 1.0, min_p=0.1),
    ]
    params = joined(kinds)
    logits = random_logits(25)
    positions = torch.arange(25) * 3
    together = sample(logits, params, positions)
    for i, kind in enumerate(kinds):
        part = slice(5 * i, 5 * i + 5)
        assert torch.equal(sample(logits[part], kind, positions[part]), together[part])
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    shuffled = params._replace(
        temperature=params.temperature[order],
        top_k=params.top_k[order],
        top_p=params.top_p[order],
        min_p=params.min_p[order],
        seed=params.seed[order],
    )
    assert torch.equal(sample(logits[order], shuffled, positions[order]), together[order])
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 4 * VOCAB)
    assert torch.equal(sample(logits, params, positions), together)


def test_a_filter_elsewhere_in_the_batch_changes_no_row() -> None:
    logits = random_logits(200)
    positions = torch.arange(200)
    without = sample(logits, parameters(200, 1.2), positions)
    mixed = joined([parameters(200, 1.2), parameters(1, 1.2, top_k=3)])
    logits, positions = torch.cat((logits, logits[:1])), torch.cat((positions, positions[:1]))
    assert torch.equal(sample(logits, mixed, positions)[:200], without)


@pytest.mark.parametrize("temperature", [1e-45, 1e-12, 1e-4, 10.0])
def test_extreme_temperatures_and_logits_stay_in_the_vocabulary(temperature: float) -> None:
    logits = random_logits(20, scale=1e4)
    sampled = sample(logits, parameters(20, temperature, top_p=0.9), torch.arange(20))
    assert ((sampled >= 0) & (sampled < VOCAB)).all()
    if temperature < 1e-3:
        assert torch.equal(sampled, logits.argmax(-1))


def test_logits_are_left_as_they_were_and_no_rows_give_none() -> None:
    logits = random_logits(4)
    before = logits.clone()
    sample(logits, parameters(4, 0.5, top_k=3), torch.arange(4))
    assert torch.equal(logits, before)
    assert sample(logits[:0], parameters(0), torch.arange(0)).tolist() == []


@pytest.mark.parametrize("k", [0, 5])
def test_logprobs_are_the_chosen_ones_then_the_likeliest(k: int) -> None:
    logits = random_logits(6)
    chosen = torch.tensor([0, 300, 5, 7, 11, 13])
    ids, values = logprobs(logits, chosen, k, VocabShard(TensorParallel(), 0))
    assert ids.shape == values.shape == (6, k + 1)
    wanted = logits.double().log_softmax(-1)
    torch.testing.assert_close(values.double(), wanted.gather(1, ids), rtol=1e-5, atol=1e-5)
    assert torch.equal(ids[:, 0], chosen)
    assert torch.equal(ids[:, 1:], wanted.argsort(-1, descending=True)[:, :k])
