"""The rotary position embedding that config.json asks for.

Only scalings whose frequencies are the same at every length are served. With others (`dynamic`,
`longrope`) the frequencies change as a sequence grows, and keys in the cache would not match.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from nanovllm.checkpoint.files import CheckpointError
from nanovllm.wording import mistake

DEFAULT_THETA = 10_000.0
Factor = Annotated[float, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]


class Rope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Su et al., 2021, "RoFormer". Field names are those of config.json, here and below."""

    rope_theta: Annotated[float, Meta(gt=1)]
    partial_rotary_factor: Annotated[float, Meta(ge=1, le=1)] = 1.0


class LinearRope(Rope, frozen=True, kw_only=True):
    """Positions are divided by the factor."""

    factor: Factor


class Llama3Rope(Rope, frozen=True, kw_only=True):
    """Llama 3.1's scaling: low frequencies are divided by the factor, high ones are kept, and those
    between are interpolated."""

    factor: Factor
    original_max_position_embeddings: Annotated[int, Meta(ge=1)]
    low_freq_factor: Positive
    high_freq_factor: Positive

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be above low_freq_factor")


class YarnRope(Rope, frozen=True, kw_only=True):
    """YaRN (Peng et al., 2023): a dimension that turns often within the original length keeps its
    frequency, one that turns seldom has it divided by the factor, with a linear ramp between."""

    factor: Factor
    original_max_position_embeddings: Annotated[int, Meta(ge=1)]
    attention_factor: Positive | None = None
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.beta_fast < self.beta_slow:
            raise ValueError("beta_fast must not be below beta_slow")

    @property
    def context_length(self) -> int:
        """Positions that the scaling makes out of the original ones."""
        return int(self.factor * self.original_max_position_embeddings)


_TYPES: dict[str, type[Rope]] = {
    "default": Rope,
    "linear": LinearRope,
    "llama3": Llama3Rope,
    "yarn": YarnRope,
}


class RopeKeys(msgspec.Struct, kw_only=True):
    """The keys of config.json that concern the rotary embedding."""

    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    original_max_position_embeddings: int | None = None
    partial_rotary_factor: float | None = None


def read_rope(path: Path, keys: RopeKeys, max_position_embeddings: int) -> Rope:
    """What the keys of `path` mean to transformers: `rope_scaling` takes the place of
    `rope_parameters`, and the keys beside these maps fill in what the map lacks.

    Raises:
        CheckpointError: for a type that is not served, and for a parameter that is missing, out of
            range, unknown, or of no use to its type.
    """
    name = "rope_scaling" if keys.rope_scaling else "rope_parameters"
    given = keys.rope_scaling or keys.rope_parameters or {}
    values = {key: value for key, value in given.items() if value is not None}
    rope_type = values.pop("rope_type", None) or values.get("type", "default")
    if values.get("type") == rope_type:  # the oldest spelling of rope_type
        del values["type"]
    kind = _TYPES.get(rope_type) if isinstance(rope_type, str) else None
    if kind is None:
        served = ", ".join(_TYPES)
        raise CheckpointError(
            f"{path}: {name}: rope type {rope_type!r} is not served; these are: {served}"
        )
    if by_layer := sorted(key for key, value in values.items() if isinstance(value, dict)):
        raise CheckpointError(
            f"{path}: {name}: a map for each layer type ({', '.join(by_layer)}) is not served; one"
            " map for all layers is"
        )
    values.setdefault("rope_theta", DEFAULT_THETA if keys.rope_theta is None else keys.rope_theta)
    other = (keys.rope_parameters or {}).get("rope_theta") or values["rope_theta"]
    if keys.rope_scaling and other != values["rope_theta"]:
        raise CheckpointError(
            f"{path}: rope_scaling, which takes the place of rope_parameters, has rope_theta"
            f" {values['rope_theta']}, and rope_parameters {other}: give both the same"
        )
    if keys.partial_rotary_factor is not None:
        values.setdefault("partial_rotary_factor", keys.partial_rotary_factor)
    if "original_max_position_embeddings" in kind.__struct_fields__:
        if keys.original_max_position_embeddings is not None:
            values["original_max_position_embeddings"] = keys.original_max_position_embeddings
        values.setdefault("original_max_position_embeddings", max_position_embeddings)
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: {name} of type {rope_type!r}: {mistake(error)}") from None
