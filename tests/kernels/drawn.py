"""Kinds of rows to sample, and a comparison with the tokens that the reference draws."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels.sampling import SHORTLIST_SIZE, reference
from nanovllm.kernels.sampling.random_stream import exponential_noise, stream_keys
from nanovllm.kernels.sampling.reference import SamplingTensors, filter_mask, temper

# Sums are rounded otherwise than the reference's, and logarithms are good to 1e-6.
EDGE = 2e-5
NOISE = 1e-5

Row = tuple[float, int, float, float]
"""Temperature, top_k, top_p, min_p."""

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
    "top-k of a whole shortlist": (2.0, 64, 0.95, 0.0),
}

# Those that do not need whole logits.
BY_SHORTLISTS = {
    name: row
    for name, row in KINDS.items()
    if row[0] == 0 or 0 < row[1] <= SHORTLIST_SIZE or row[1:] == (0, 1.0, 0.0)
}


def row_tensors(rows: list[Row], seed: int, device: torch.device) -> SamplingTensors:
    """Parameters of rows, each with a seed of its own."""
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    return SamplingTensors(
        temperature=torch.tensor(temperature, dtype=torch.float32, device=device),
        top_k=torch.tensor(top_k, dtype=torch.int32, device=device),
        top_p=torch.tensor(top_p, dtype=torch.float32, device=device),
        min_p=torch.tensor(min_p, dtype=torch.float32, device=device),
        seed=torch.arange(seed, seed + len(rows), device=device) * 7919 - 5,
    )


def count_other(found: Tensor, logits: Tensor, params: SamplingTensors, positions: Tensor) -> int:
    """How many tokens differ from the reference's. Each must do so for a reason that rounding
    explains: it has as good a score with noise, or one of the two stands at the very edge of top-p
    or min-p."""
    expected = reference.sample(logits, params, positions)
    differ = (found != expected).nonzero().flatten().tolist()
    for row in differ:
        part = slice(row, row + 1)
        temperature, top_k, top_p, min_p, seed = (values[part, None] for values in params)
        assert temperature.item() > 0, "greedy"
        scores = temper(logits[part], temperature[0])
        tightened = filter_mask(scores, top_k, top_p * (1 - EDGE), min_p * (1 + EDGE))
        nearly = (top_p * (1 + EDGE)).clamp_max(1 - EDGE / 9)
        loosened = filter_mask(scores, top_k, torch.where(top_p < 1, nearly, 1), min_p * (1 - EDGE))
        noise = exponential_noise(stream_keys(seed[0], positions[part]), logits.shape[1])
        noisy = (scores - noise.log())[0]
        token = int(found[row])
        assert loosened[0, token], "not kept"
        least = noisy.masked_fill(~tightened[0], -torch.inf).max()
        assert noisy[token] >= least - NOISE, "not the one that was drawn"
    return len(differ)


def fill_with(logits: Tensor, fill: str, finite: int) -> None:
    """Makes ties and infinities of them; `finite` is the only column that is, where one is."""
    if fill == "equal":
        logits.fill_(-2.5)
    elif fill == "rounded":
        logits.round_()
    elif fill == "mostly -inf":
        logits[logits < 4] = -torch.inf
    elif fill == "all -inf":
        logits.fill_(-torch.inf)
    elif fill == "one finite":
        logits[:, :finite] = -torch.inf
        logits[:, finite + 1 :] = -torch.inf
