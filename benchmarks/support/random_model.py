"""Checkpoints of any shape with random weights: speed does not depend on what they say."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from nanovllm.checkpoint import DEMO_CHECKPOINT, resolve_model

random_weights_option = click.option(
    "--random-weights",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A config.json: a model of this shape with random weights instead of MODEL.",
)

FP8_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


@contextlib.contextmanager
def checkpoint(
    model: str, random_weights: Path | None, tokenizer: Path = DEMO_CHECKPOINT
) -> Iterator[Path]:
    """The directory of `model`, or for the time being one with random weights.

    Args:
        random_weights: a config.json, whose shape they have.
        tokenizer: the directory of the tokenizer that they get.
    """
    if random_weights is None:
        yield resolve_model(model)
        return
    with tempfile.TemporaryDirectory(prefix="nanovllm-random-") as directory:
        write_random_checkpoint(random_weights, Path(directory), tokenizer)
        yield Path(directory)


def write_random_checkpoint(
    config: Path, directory: Path, tokenizer: Path = DEMO_CHECKPOINT
) -> None:
    """Writes a checkpoint of `config`'s shape: random bf16 weights, those of projections in FP8 if
    the config has a `quantization_config`; the tokenizer of a directory."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    keys = json.loads(config.read_bytes())
    quantization = keys.pop("quantization_config", None)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(Qwen3Config(**keys))
    model.to(torch.bfloat16).save_pretrained(str(directory))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, directory)
    if quantization is not None:
        store_in_fp8(directory)


def store_in_fp8(directory: Path) -> None:
    """Rewrites a checkpoint with its projections in FP8, as Qwen's are."""
    import torch
    from safetensors.torch import load_file, save_file

    from nanovllm.kernels.layers.fp8 import quantize

    device = "cuda" if torch.cuda.is_available() else "cpu"
    files: dict[str, str] = {}
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            weight = quantize(tensors[name].to(device))
            tensors[name] = weight.values.cpu()
            tensors[f"{name}_scale_inv"] = weight.scales.cpu()
        save_file(tensors, path)
        files |= dict.fromkeys(tensors, path.name)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config = json.loads((directory / "config.json").read_bytes())
    config["quantization_config"] = FP8_CONFIG
    (directory / "config.json").write_text(json.dumps(config))
