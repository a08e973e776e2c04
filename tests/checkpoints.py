"""Random Qwen3 and Qwen2 checkpoints, written by transformers itself."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

TOKENIZER_FILES = ("tokenizer*.json", "chat_template.jinja", "vocab.json", "merges.txt")


def write_checkpoint(
    directory: Path,
    *,
    seed: int = 0,
    shards: int = 1,
    tokenizer: Path | None = None,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Writes a small random checkpoint in Hugging Face format, and returns its directory.

    Args:
        shards: the number of safetensors files.
        tokenizer: a directory whose tokenizer files are copied; `vocab_size` must hold its ids.
        dtype: of the weights as stored.
        overrides: `family`, see `random_model`, and the config's own: `vocab_size`,
            `hidden_size`, `num_attention_heads`, `num_key_value_heads`, `head_dim`,
            `tie_word_embeddings`, `rope_parameters`, `eos_token_id` …
    """
    model = random_model(seed=seed, **overrides).to(dtype)
    total = sum(parameter.nbytes for parameter in model.parameters())
    # A file is closed when the next tensor would overfill it: leave room for the largest.
    largest = max(parameter.nbytes for parameter in model.parameters())
    limit = total + 1 if shards == 1 else max(largest, math.ceil(total / (shards - 0.5)))
    model.save_pretrained(directory, max_shard_size=limit)
    written = len(list(directory.glob("*.safetensors")))
    if written != shards:
        raise ValueError(f"{written} shards instead of {shards}: choose another shape")
    if tokenizer is not None:
        for pattern in TOKENIZER_FILES:
            for file in tokenizer.glob(pattern):
                shutil.copy(file, directory)
    return directory


def random_model(seed: int = 0, family: str = "qwen3", **overrides: Any) -> Any:
    """A small model in float32, every weight of it random: norms and biases too.

    Args:
        family: "qwen2" or "qwen3".
    """
    values: dict[str, Any] = {
        "vocab_size": 515,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        **({"head_dim": 16} if family == "qwen3" else {}),
        "max_position_embeddings": 4096,
        "eos_token_id": None,
        **overrides,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}[family](**values)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith("embed_tokens.weight"):
                    parameter.normal_(std=0.5)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.1)
                else:
                    parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
    return model


def read_model(directory: Path) -> Any:
    """The checkpoint as transformers loads it, in float32."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
