"""The random stream: noise as a pure function of (seed, position, token id), in plain torch.

A row takes 64-bit arithmetic and a token 32-bit arithmetic, modulo 2**64 and 2**32. Torch's signed
integers wrap around; a mask makes their right shifts logical.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Scales [0, 2**31] to [0, 1 - 2**-24], the largest float32 below 1.
UNIT = (1 - 2.0**-24) * 2.0**-31


def stream_keys(seed: Tensor, positions: Tensor) -> Tensor:
    """A key int64 [n] for each (seed, position): the finalizer of splitmix64 over both, in turn."""
    return _mix64(_mix64(seed) + positions)


def exponential_noise(keys: Tensor, vocab: int, first: int = 0) -> Tensor:
    """Samples of Exp(1) for the tokens [first, first + vocab): float32 [n, vocab]."""
    tokens = torch.arange(first, first + vocab, dtype=torch.int32, device=keys.device)
    return exponential_noise_of(keys, tokens)


def exponential_noise_of(keys: Tensor, tokens: Tensor) -> Tensor:
    """Samples of Exp(1) for tokens int32 [c] or [n, c]: float32 [n, c].

    Down to 2**-7 a sample has a relative precision of 2**-24; below, samples are steps of 2**-31.
    The least is 2**-32, so that its logarithm is finite.
    """
    bits = token_bits(keys, tokens).bitwise_and_(0x7FFFFFFF)
    return bits.to(torch.float32).add_(0.5).mul_(-UNIT).log1p_().neg_()


def token_bits(keys: Tensor, tokens: Tensor) -> Tensor:
    """32 random bits for each row's tokens int32 [c] or [n, c]: int32 [n, c].

    The hash is `lowbias32` (Wellons, "Prospecting for Hash Functions", with constants found later
    by TheIronBorn). Half of the row's key enters at its start and half in its middle: so two keys
    never merely permute the same noise over the tokens.
    """
    low = (keys & 0xFFFFFFFF).to(torch.int32)[:, None]
    high = (keys >> 32).to(torch.int32)[:, None]
    bits = tokens ^ low
    bits ^= _shifted32(bits, 16)
    bits *= _signed32(0x21F0AAAD)
    bits ^= high
    bits ^= _shifted32(bits, 15)
    bits *= _signed32(0xD35A2D97)
    bits ^= _shifted32(bits, 15)
    return bits


def _mix64(x: Tensor) -> Tensor:
    """One output of splitmix64 (Steele et al., 2014) from the state x, int64."""
    x = x + _signed64(0x9E3779B97F4A7C15)
    x = (x ^ _shifted64(x, 30)) * _signed64(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted64(x, 27)) * _signed64(0x94D049BB133111EB)
    return x ^ _shifted64(x, 31)


def _shifted32(x: Tensor, by: int) -> Tensor:
    return (x >> by).bitwise_and_((1 << (32 - by)) - 1)


def _shifted64(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed32(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


def _signed64(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
