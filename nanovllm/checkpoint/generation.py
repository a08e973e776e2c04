"""generation_config.json: the end-of-sequence ids."""

from __future__ import annotations

from pathlib import Path

import msgspec

from nanovllm.checkpoint.files import read_json


def eos_token_ids(directory: Path) -> list[int] | None:
    """End-of-sequence ids: generation_config.json's, else config.json's, else None.

    None means that the tokenizer's own end-of-sequence token is the one.
    """
    for name in ("generation_config.json", "config.json"):
        try:
            found = read_json(directory / name, _EosOnly).eos_token_id
        except FileNotFoundError:
            continue
        if found is not None:
            return found if isinstance(found, list) else [found]
    return None


class _EosOnly(msgspec.Struct):
    eos_token_id: int | list[int] | None = None
