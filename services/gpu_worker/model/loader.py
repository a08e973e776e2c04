"""Reads a checkpoint's safetensors straight into a rank's shard of the model.

A rank reads only the slices that it holds. Each slice is converted while it is copied to its place,
so that the weights are never in memory twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open

from nanovllm.checkpoint import CheckpointError, ModelConfig
from nanovllm.checkpoint.files import read_json, refuse_pointer
from nanovllm.services.gpu_worker.model.layers import CheckpointTensor
from nanovllm.services.gpu_worker.model.registry import Model

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOATS = ("BF16", "F16", "F32", "F64")


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def load_checkpoint(model: Model, directory: Path, progress: Callable[[int, int], None]) -> None:
    """Fills all of the model's weights from `directory`.

    Args:
        progress: takes the bytes done and the bytes in total, as this rank's memory holds them.
            Called at the start and after each tensor.

    Raises:
        CheckpointError: if files or tensors are missing, unexpected, unreadable or of the wrong
            shape or type; the message names them.
    """
    wanted = {tensor.name: tensor for tensor in model.checkpoint_tensors()}
    files = _files_of_tensors(directory)
    _check_names(directory, set(files), set(wanted), model.config)
    total = sum(tensor.target.nbytes for tensor in wanted.values())
    done = 0
    progress(done, total)
    for path in sorted(set(files.values())):
        present = [tensor for name, tensor in wanted.items() if files[name] == path]
        with _opened(path) as opened:
            for tensor in present:
                _load(tensor, opened.get_slice(tensor.name), path, model.config)
                done += tensor.target.nbytes
                progress(done, total)


def _files_of_tensors(directory: Path) -> dict[str, Path]:
    """The file of each tensor, by the tensor's name. Where there are both, the single file is the
    one, as for transformers."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.exists():
        with _opened(single) as opened:
            return dict.fromkeys(opened.keys(), single)
    try:
        weight_map = read_json(index, _Index).weight_map
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}") from None
    return {name: directory / file for name, file in weight_map.items()}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file. Raises CheckpointError if it cannot be read, here or while it is open."""
    try:
        with path.open("rb") as file:
            refuse_pointer(path, file.read(64))
        with safe_open(path, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _check_names(directory: Path, found: set[str], wanted: set[str], config: ModelConfig) -> None:
    if missing := wanted - found:
        reason = f"{directory} lacks {_listed(missing)}"
        if "embed_tokens.weight" in found:
            reason += (
                "; its tensors' names lack 'model.', as those of a model that makes embeddings:"
                " only causal language models are served"
            )
        raise CheckpointError(reason)
    # A tied model's head is its embedding, whether or not the checkpoint repeats it.
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unexpected := found - wanted - ignored:
        raise CheckpointError(
            f"{directory} has tensors that its config.json does not call for: {_listed(unexpected)}"
        )


def _listed(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return ", ".join([first, *others[:2]]) + (f" and {len(others) - 2} more" * (len(others) > 2))


def _load(tensor: CheckpointTensor, source: Any, path: Path, config: ModelConfig) -> None:
    """Copies this rank's part; `source` is the safetensors slice of the whole tensor."""
    shape = tuple(source.get_shape())
    if shape != tensor.shape:
        reason = (
            f"{path}: {tensor.name} has shape {list(shape)}; config.json says {list(tensor.shape)}"
        )
        if tensor.name.endswith("q_proj.weight") and shape[0] % config.num_attention_heads == 0:
            head_dim = shape[0] // config.num_attention_heads
            reason += f", with head_dim {config.head_dim}: is it {head_dim}? Set it there"
        raise CheckpointError(reason)
    if (dtype := source.get_dtype()) not in FLOATS:
        raise CheckpointError(
            f"{path}: {tensor.name} is {dtype}; only {', '.join(FLOATS)} are served"
        )
    if tensor.dim is None:
        part = source[:]
    else:
        end = tensor.start + tensor.target.shape[tensor.dim]
        part = source[tensor.start : end] if tensor.dim == 0 else source[:, tensor.start : end]
    tensor.target.copy_(part)
