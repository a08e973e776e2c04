"""The rotary embedding's parameters in config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from nanovllm.checkpoint.errors import CheckpointError


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True, rename={"type": "rope_type"}):
    """Rotary embedding, from `rope_parameters` or from `rope_theta` and `rope_scaling`.

    Field names are those of config.json; a field that its `type` does not use is None.
    """

    type: str = "default"
    rope_theta: float = 10_000.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    partial_rotary_factor: float | None = None


def read_rope(
    path: Path,
    rope_theta: float | None,
    rope_scaling: dict[str, Any] | None,
    rope_parameters: dict[str, Any] | None,
) -> RopeConfig:
    """The rotary embedding that these keys of `path` ask for.

    Raises CheckpointError for parameters of a wrong type.
    """
    values: dict[str, Any] = dict(rope_parameters or rope_scaling or {})
    if "type" in values:  # the oldest spelling of rope_type
        values.setdefault("rope_type", values.pop("type"))
    values.setdefault("rope_theta", 10_000.0 if rope_theta is None else rope_theta)
    try:
        return msgspec.convert(values, RopeConfig)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: rope parameters: {error}") from None
