"""The tokens of `--device sim`: a well-mixed function of (seed, position)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanovllm.checkpoint import CheckpointError, ModelConfig
from nanovllm.grammars import Masks, Matcher
from nanovllm.messages import NO_TOKEN_LEFT, Admission
from nanovllm.token_sets import WORD_BITS
from nanovllm.vocabulary import Vocabulary

_SEED_FACTOR = np.uint64(0xD1342543DE82EF95)
_POSITION_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Choice(NamedTuple):
    """What a sequence draws from. There are no logits, so that penalties and bias, and bad words of
    several tokens, change nothing.

    Attributes:
        early, later: int32, the tokens for positions before `min_length`, and from there on.
    """

    early: NDArray[np.int32]
    later: NDArray[np.int32]
    min_length: int

    @classmethod
    def of(
        cls, admission: Admission, vocabulary: NDArray[np.int32], matcher: Matcher | None
    ) -> Choice:
        """Args:
        vocabulary: int32, what sequences without a grammar draw from.
        """
        sampling = admission.sampling
        later = vocabulary
        if matcher is not None:
            later = np.arange(matcher.words * WORD_BITS, dtype=np.int32)
        if sampling.allowed_token_ids is not None:
            later = np.array(sorted({*sampling.allowed_token_ids}), dtype=np.int32)
        bad = [word[0] for word in sampling.bad_words if len(word) == 1]
        later = np.setdiff1d(later, np.array(bad, dtype=np.int32))
        stops = np.array(sampling.stop_token_ids, dtype=np.int32)
        min_length = admission.prompt_tokens + sampling.min_tokens
        return cls(np.setdiff1d(later, stops), later, min_length)

    def draw(self, seed: np.int64, position: np.int32, mask: Masks | None) -> int:
        """Args:
        mask: int32 [words], what its grammar allows, if it has one.
        """
        tokens = self.early if position < self.min_length else self.later
        if mask is not None:
            tokens = tokens[(mask[tokens // WORD_BITS] >> (tokens % WORD_BITS)) & 1 != 0]
        if not len(tokens):
            return NO_TOKEN_LEFT
        return int(tokens[draw(np.array([seed]), np.array([position]), len(tokens))[0]])


def rules_tokens_out(admission: Admission) -> bool:
    """Whether the request rules tokens out, other than by a grammar."""
    sampling = admission.sampling
    return bool(sampling.allowed_token_ids is not None or sampling.bad_words or sampling.min_tokens)


def draw_of(
    masks: Masks, seeds: NDArray[np.int64], positions: NDArray[np.int32]
) -> NDArray[np.int32]:
    """A token of each mask int32 [n, words], int32 [n]; NO_TOKEN_LEFT where the mask is empty."""
    counts = np.bitwise_count(masks.view(np.uint32))  # of int32 it would count the absolute value
    ends = counts.cumsum(axis=1, dtype=np.int32)
    totals = ends[:, -1]
    indices = draw(seeds, positions, np.maximum(totals, 1))
    rows = np.arange(len(masks))
    words = (ends > indices[:, None]).argmax(axis=1)
    bits = np.unpackbits(masks[rows, words].view(np.uint8), bitorder="little")
    ranks = indices - ends[rows, words] + counts[rows, words]
    in_word = bits.reshape(-1, WORD_BITS).cumsum(axis=1, dtype=np.int32) > ranks[:, None]
    tokens = words * WORD_BITS + in_word.argmax(axis=1)
    return np.where(totals > 0, tokens, NO_TOKEN_LEFT).astype(np.int32)


def draw(
    seeds: NDArray[np.int64], positions: NDArray[np.int32], size: int | NDArray[np.int32]
) -> NDArray[np.int64]:
    """An index in [0, size) for each (seed, position): the finalizer of splitmix64 (Steele et al.,
    2014) over the sum of both, each times an odd constant, modulo 2**64."""
    x = seeds.view(np.uint64) * _SEED_FACTOR + positions.astype(np.uint64) * _POSITION_FACTOR
    x = (x ^ (x >> _SHIFTS[0])) * _FACTORS[0]
    x = (x ^ (x >> _SHIFTS[1])) * _FACTORS[1]
    indices: NDArray[np.int64] = (
        (x ^ (x >> _SHIFTS[2])) % np.asarray(size).astype(np.uint64)
    ).astype(np.int64)
    return indices


def ordinary_tokens(directory: Path, config: ModelConfig) -> NDArray[np.int32]:
    """int32 [v], the ids of tokens that are text: neither special nor an end of sequence.

    Raises CheckpointError if the tokenizer cannot be read, or has no such token.
    """
    special = set(config.eos_token_ids or ())
    known = Vocabulary.from_checkpoint(directory).text.keys() & range(config.vocab_size)
    if not known - special:
        raise CheckpointError(f"{directory} has no token that is not special")
    return np.array(sorted(known - special), dtype=np.int32)
