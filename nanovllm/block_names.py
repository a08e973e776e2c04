"""Names of full blocks of the KV cache: the same in every scheduler, and in the ingress."""

from __future__ import annotations

import xxhash

TOKEN_BYTES = 4  # an int32


def root_name(salt: str) -> bytes:
    """The name before the first block of a sequence. Only sequences with the same salt share
    blocks."""
    name: bytes = xxhash.xxh64_digest(salt.encode())
    return name


def name_of(predecessor: bytes, tokens: bytes) -> bytes:
    """The name of a full block that holds `tokens` (int32) after the block named `predecessor`."""
    name: bytes = xxhash.xxh64_digest(predecessor + tokens)
    return name
