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
from torch import Tensor

from nanovllm.checkpoint import CheckpointError, ModelConfig
from nanovllm.checkpoint.files import read_json, refuse_pointer
from nanovllm.checkpoint.quantization import FP8_BLOCK
from nanovllm.kernels.layers.fp8 import Fp8Weight, quantize
from nanovllm.kernels.layers.ops import Weight, whole
from nanovllm.services.gpu_worker.model.layers import CheckpointTensor
from nanovllm.services.gpu_worker.model.registry import Model

log = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What follows an FP8 weight's name in that of its scales.
SCALES = "_scale_inv"
STORED_FP8 = "F8_E4M3"
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
    scaled = {name for name, tensor in wanted.items() if _is_stored_in_fp8(tensor, model.config)}
    names = wanted.keys() | {name + SCALES for name in scaled}
    _check_names(directory, set(files), names, model.config)
    total = sum(tensor.target.nbytes for tensor in wanted.values())
    done = 0
    progress(done, total)
    for path in sorted(set(files.values())):
        present = [tensor for name, tensor in wanted.items() if files[name] == path]
        with _opened(path) as opened:
            for tensor in present:
                part = _read(tensor, opened.get_slice(tensor.name), path, model.config)
                if tensor.name in scaled:
                    scales = _scales(tensor, files[tensor.name + SCALES])
                    _fill(tensor, Fp8Weight(part, scales), model.config)
                else:
                    _fill(tensor, part, model.config)
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
        elif all(name.endswith(SCALES) for name in missing):
            reason += (
                "; by config.json's quantization_config a projection is FP8, and only FP8 with such"
                f" a scale for each block of {FP8_BLOCK} x {FP8_BLOCK} weights is served"
            )
        raise CheckpointError(reason)
    # See `as_stored`: a head that the checkpoint of a tied model repeats is its embedding.
    ignored = {HEAD} if config.tie_word_embeddings else set()
    if unexpected := found - wanted - ignored:
        reason = (
            f"{directory} has tensors that its config.json does not call for: {_listed(unexpected)}"
        )
        if not config.stores_fp8 and any(name.endswith(("_scale", SCALES)) for name in unexpected):
            reason += "; they scale quantized weights, but config.json has no quantization_config"
        raise CheckpointError(reason)


def _listed(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return ", ".join([first, *others[:2]]) + (f" and {len(others) - 2} more" * (len(others) > 2))


def _is_stored_in_fp8(tensor: CheckpointTensor, config: ModelConfig) -> bool:
    return config.stores_fp8 and tensor.projection


def _read(tensor: CheckpointTensor, source: Any, path: Path, config: ModelConfig) -> Tensor:
    """This rank's part; `source` is the safetensors slice of the whole tensor."""
    shape = tuple(source.get_shape())
    if shape != tensor.shape:
        reason = (
            f"{path}: {tensor.name} has shape {list(shape)}; config.json says {list(tensor.shape)}"
        )
        if tensor.name.endswith("q_proj.weight") and shape[0] % config.num_attention_heads == 0:
            head_dim = shape[0] // config.num_attention_heads
            reason += f", with head_dim {config.head_dim}: is it {head_dim}? Set it there"
        raise CheckpointError(reason)
    dtype = source.get_dtype()
    if _is_stored_in_fp8(tensor, config):
        if dtype != STORED_FP8:
            raise CheckpointError(
                f"{path}: {tensor.name} is {dtype}; config.json's quantization_config says"
                f" {STORED_FP8}"
            )
    elif dtype not in FLOATS:
        raise CheckpointError(
            f"{path}: {tensor.name} is {dtype}; only {', '.join(FLOATS)} are served"
        )
    return _part(tensor, source)


def _scales(tensor: CheckpointTensor, path: Path) -> Tensor:
    """The scales of this rank's part of an FP8 weight."""
    name = tensor.name + SCALES
    with _opened(path) as opened:
        source = opened.get_slice(name)
        shape, expected = source.get_shape(), [size // FP8_BLOCK for size in tensor.shape]
        if shape != expected or source.get_dtype() not in FLOATS:
            raise CheckpointError(
                f"{path}: {name} is {source.get_dtype()} of shape {shape}; it must be floats of"
                f" shape {expected}, one for each block of {FP8_BLOCK} x {FP8_BLOCK}"
            )
        scales = source[:].float()
    # All of them, so that every rank refuses what one would.
    if not ((scales >= 0) & scales.isfinite()).all():
        raise CheckpointError(
            f"{path}: {name} has values that are negative or not finite; fetch the file again, or"
            " take another checkpoint"
        )
    return _part(tensor, scales, FP8_BLOCK)


def _part(tensor: CheckpointTensor, source: Any, block: int = 1) -> Tensor:
    """This rank's part of a slice that has one value for each `block` of the tensor's."""
    part: Tensor
    if tensor.dim is None:
        part = source[:]
        return part
    target = tensor.target.values if isinstance(tensor.target, Fp8Weight) else tensor.target
    start, end = tensor.start // block, (tensor.start + target.shape[tensor.dim]) // block
    part = source[start:end] if tensor.dim == 0 else source[:, start:end]
    return part


def _fill(tensor: CheckpointTensor, part: Weight, config: ModelConfig) -> None:
    """Fills the target. The weights are the same wherever they run: a device without FP8 holds the
    values of the FP8 weights in its own dtype."""
    target = tensor.target
    if isinstance(part, Fp8Weight):
        part = Fp8Weight(part.values.to(target.device), part.scales.to(target.device))
    elif tensor.projection and config.fp8:
        part = quantize(part.to(target.device))
    if isinstance(target, Tensor):
        target.copy_(whole(part))
    elif isinstance(part, Fp8Weight):
        target.copy_(part)
