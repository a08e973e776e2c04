"""The random stream of random_stream.py, as Triton functions."""

from __future__ import annotations

import triton
import triton.language as tl

from nanovllm.kernels.sampling.random_stream import UNIT

LN_2 = tl.constexpr(0.6931471805599453)
_UNIT = tl.constexpr(UNIT)


@triton.jit
def row_key(seed, position):
    key = _mix64(_mix64(seed.to(tl.uint64)) + position.to(tl.uint64))
    return (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def _mix64(x):
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def token_bits(low, high, tokens):
    """The 31 random bits of each token, as float32."""
    bits = tokens.to(tl.uint32) ^ low
    bits = bits ^ (bits >> 16)
    bits = bits * 0x21F0AAAD
    bits = bits ^ high
    bits = bits ^ (bits >> 15)
    bits = bits * 0xD35A2D97
    bits = bits ^ (bits >> 15)
    return (bits & 0x7FFFFFFF).to(tl.float32)


@triton.jit
def gumbel(bits):
    """-log(exponential_noise) of these bits, to 1e-6."""
    u = (bits + 0.5) * _UNIT
    # E = -log(1 - u). Where u is small, rounding 1 - u would lose too much: there E is u times the
    # Chebyshev interpolation of -log(1 - u) / u over [0, 1/4], good to 4e-8.
    series = 0.33863464 * u + 0.14463115
    series = series * u + 0.25764420
    series = series * u + 0.33287035
    series = series * u + 0.50001008
    series = series * u + 0.99999996
    exponential = tl.where(u < 0.25, series * u, tl.log2(1.0 - u) * -LN_2)
    return tl.log2(exponential) * -LN_2
