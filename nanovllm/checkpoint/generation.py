"""The end-of-sequence ids, and how the checkpoint's makers would sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from nanovllm.checkpoint.files import CheckpointError, read_json
from nanovllm.protocol import RepetitionPenalty


class _EosOnly(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


def read_eos_token_ids(directory: Path, vocab_size: int) -> tuple[int, ...] | None:
    """generation_config.json's, else config.json's, else None.

    Raises:
        CheckpointError: for an id that the model never gives: outputs would not end.
    """
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        try:
            found = read_json(path, _EosOnly).eos_token_id
        except FileNotFoundError:
            continue
        if found is not None:
            ids = tuple(found) if isinstance(found, list) else (found,)
            for token_id in ids:
                check_eos(f"{path}: eos_token_id", token_id, vocab_size)
            return ids
    return None


def check_eos(source: str, token_id: int, vocab_size: int) -> None:
    """Raises CheckpointError unless the model can give the end of sequence that `source` names."""
    if not 0 <= token_id < vocab_size:
        raise CheckpointError(
            f"{source} {token_id} is not in the vocabulary: vocab_size is {vocab_size}"
        )


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """How to sample where a request does not say: None where the checkpoint does not either."""

    temperature: Annotated[float, Meta(ge=0, le=10)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: RepetitionPenalty | None = None


def read_sampling_defaults(directory: Path) -> SamplingDefaults:
    """generation_config.json's.

    Raises:
        CheckpointError: for a value out of range.
    """
    try:
        return read_json(directory / "generation_config.json", SamplingDefaults)
    except FileNotFoundError:
        return SamplingDefaults()
