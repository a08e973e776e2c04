"""Sets of token ids, one bit a token: token t is bit t % WORD_BITS of word t // WORD_BITS."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

WORD_BITS: Final = 32


def num_words(vocab_size: int) -> int:
    """How many int32 words a set of a vocabulary's tokens has."""
    return -(-vocab_size // WORD_BITS)


def token_set(
    token_ids: Iterable[int] | None, words: int, without: Iterable[int] = ()
) -> NDArray[np.int32]:
    """The set int32 [words] of `token_ids`, or of all tokens if None is given; less `without`."""
    members = np.full(words * WORD_BITS, token_ids is None, dtype=np.uint8)
    members[np.fromiter(token_ids or (), dtype=np.int64)] = 1
    members[np.fromiter(without, dtype=np.int64)] = 0
    return np.packbits(members, bitorder="little").view("<i4")
