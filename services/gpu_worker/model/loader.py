"""Reads a checkpoint's safetensors straight into a rank's shard of the model.

A rank reads only the slices that it holds. Each slice is converted while it is copied to its place,
so that the weights are never in memory twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from nanovllm.checkpoint import CheckpointError, ModelConfig
from nanovllm.checkpoint.files import read_json, refuse_pointer
from nanovllm.services.gpu_worker.model.layers import CheckpointTensor
from nanovllm.services.gpu_worker.model.registry import Model

log = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# The types that are read, by safetensors' names, and torch's names of them.
FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
# How many values of two matrices are compared at once.
COMPARED_VALUES = 1 << 24


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def as_stored(config: ModelConfig, directory: Path) -> ModelConfig:
    """The config with what the weights themselves say, as transformers does: their dtype, where
    config.json gives none; and a head of its own, where one is stored that is not the embedding.

    Raises:
        CheckpointError: if the files cannot be read.
    """
    files = _files_of_tensors(directory)
    if config.dtype is None and EMBEDDING in files:
        with _opened(files[EMBEDDING]) as opened:
            stored = opened.get_slice(EMBEDDING).get_dtype()
        config = msgspec.structs.replace(config, dtype=FLOATS.get(stored, stored))
    if config.tie_word_embeddings and {EMBEDDING, HEAD} <= files.keys():
        with _opened(files[EMBEDDING]) as embedding, _opened(files[HEAD]) as head:
            if not _equal(embedding.get_slice(EMBEDDING), head.get_slice(HEAD)):
                log.warning(
                    "%s: tie_word_embeddings is true, but %s differs from the embedding and is"
                    " used; set tie_word_embeddings to false",
                    directory / "config.json",
                    HEAD,
                )
                config = msgspec.structs.replace(config, tie_word_embeddings=False)
    return config


def _equal(a: Any, b: Any) -> bool:
    """Whether two safetensors slices are the same matrix, of which only a part is in memory."""
    rows, columns = a.get_shape()
    if (a.get_dtype(), [rows, columns]) != (b.get_dtype(), b.get_shape()):
        return False
    step = max(1, COMPARED_VALUES // columns)
    return all(torch.equal(a[i : i + step], b[i : i + step]) for i in range(0, rows, step))


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
    # See `as_stored`: a head that the checkpoint of a tied model repeats is its embedding.
    ignored = {HEAD} if config.tie_word_embeddings else set()
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
