"""config.json's `quantization_config`: FP8 in blocks, as Qwen stores it; all else is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from nanovllm.checkpoint.files import CheckpointError
from nanovllm.wording import mistake

FP8_BLOCK = 128
"""A block of an FP8 weight has so many outputs and inputs, and one scale."""

# Modules that no FP8 checkpoint quantizes.
_WHOLE = ("lm_head", "embed_tokens", "norm")

# What transformers and Qwen's later checkpoints write besides, of the weights that are served.
_IMPLIED: dict[str, Any] = {
    "act_per_tensor": False,
    "dequantize": False,
    "expert_dtype": "fp8",
    "modules_to_convert": None,
    "scale_fmt": "float",
    "weight_per_tensor": False,
}


class _Fp8(msgspec.Struct, forbid_unknown_fields=True):
    quant_method: Literal["fp8"]
    weight_block_size: tuple[int, int]
    fmt: Literal["e4m3"] = "e4m3"
    activation_scheme: Literal["dynamic"] = "dynamic"
    modules_to_not_convert: list[str] | None = None


def stores_fp8(path: Path, config: dict[str, Any] | None) -> bool:
    """Whether a checkpoint stores its projections in FP8: its config.json, at `path`, has this
    `quantization_config`.

    Raises:
        CheckpointError: if the weights are quantized in another way.
    """
    if config is None:
        return False
    method = config.get("quant_method") or "unknown method"
    where = f"{path}: quantization_config ({method})"
    if method != "fp8":
        raise CheckpointError(
            f"{where}: such quantized weights are not served; take the model's checkpoint in FP8"
            " with blocks of 128 x 128, or in bfloat16, float16 or float32"
        )
    told = {
        key: value for key, value in config.items() if key not in _IMPLIED or value != _IMPLIED[key]
    }
    try:
        fp8 = msgspec.convert(told, _Fp8)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"{where}: {mistake(error)}; served is e4m3 with weight_block_size [128, 128] and"
            " dynamic activations"
        ) from None
    if fp8.weight_block_size != (FP8_BLOCK, FP8_BLOCK):
        raise CheckpointError(
            f"{where}: weight_block_size {list(fp8.weight_block_size)}: only [128, 128] is served"
        )
    for module in fp8.modules_to_not_convert or ():
        if not module.endswith(_WHOLE):
            raise CheckpointError(
                f"{where}: modules_to_not_convert has {module!r}: only FP8 in all projections is"
                " served"
            )
    return True
