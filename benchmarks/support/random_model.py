"""Checkpoints of any shape with random weights: speed does not depend on what they say."""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def checkpoint(model: str, random_weights: Path | None) -> Iterator[Path]:
    """The directory of `model`, or for the time being one with random weights.

    Args:
        random_weights: a config.json, whose shape they have.
    """
    if random_weights is None:
        yield resolve_model(model)
        return
    with tempfile.TemporaryDirectory(prefix="nanovllm-random-") as directory:
        write_random_checkpoint(random_weights, Path(directory))
        yield Path(directory)


def write_random_checkpoint(config: Path, directory: Path) -> None:
    """Writes a checkpoint of `config`'s shape: random bf16 weights, the demo's tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    shape = Qwen3Config.from_json_file(str(config))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(shape)
    model.to(torch.bfloat16).save_pretrained(str(directory))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_CHECKPOINT / name, directory)
