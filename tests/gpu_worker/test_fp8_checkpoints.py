"""FP8 checkpoints: every rank gets its own blocks, and the logits are those of the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.support.random_model import store_in_fp8
from nanovllm.checkpoint import CheckpointError, ModelConfig
from nanovllm.kernels.layers.fp8 import Fp8Weight, dequantize
from nanovllm.kernels.layers.ops import whole
from nanovllm.services.gpu_worker.model.loader import load_checkpoint
from nanovllm.services.gpu_worker.model.parallel import TensorParallel
from nanovllm.services.gpu_worker.model.registry import build_model
from nanovllm.services.gpu_worker.startup import load
from nanovllm.settings import Settings
from tests.checkpoints import read_model, write_checkpoint
from tests.gpu_worker.paged import CPU, PagedSequences, load_model, relative_error

SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint in FP8 of three files, and another one with the same weights in float32."""
    root = tmp_path_factory.mktemp("fp8")
    stored = write_checkpoint(root / "fp8", shards=3, **SHAPE)
    store_in_fp8(stored)
    plain = write_checkpoint(root / "plain", **SHAPE)
    tensors: dict[str, Tensor] = {}
    for file in stored.glob("*.safetensors"):
        tensors |= load_file(file)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        weight = name.removesuffix("_scale_inv")
        tensors[weight] = dequantize(Fp8Weight(tensors[weight], tensors.pop(name)))
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    return stored, plain


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_rank_has_its_blocks(checkpoints: tuple[Path, Path], size: int) -> None:
    stored, plain = checkpoints
    for rank in range(size):
        tp = TensorParallel(rank, size)
        for found, expected in zip(
            load_model(stored, tp).checkpoint_tensors(),
            load_model(plain, tp).checkpoint_tensors(),
            strict=True,
        ):
            assert torch.equal(whole(found.target), whole(expected.target)), found.name


def test_quantizing_while_loading_gives_the_same_weights(
    checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    directory = write_checkpoint(tmp_path, **SHAPE)
    config = ModelConfig.from_checkpoint(directory, quantization="fp8")
    model = build_model(config, 64, TensorParallel(), torch.float32, CPU)
    load_checkpoint(model, directory, lambda done, total: None)
    stored = load_model(checkpoints[0])
    for found, expected in zip(
        model.checkpoint_tensors(), stored.checkpoint_tensors(), strict=True
    ):
        assert torch.equal(whole(found.target), whole(expected.target)), found.name


def test_logits_are_those_of_the_dequantized_model(checkpoints: tuple[Path, Path]) -> None:
    stored, plain = checkpoints
    tokens = [3, 500, 17, 8, 9, 200, 42]
    sequences = PagedSequences(load_model(stored), [tokens], 16)
    with torch.inference_mode():
        expected = read_model(plain)(torch.tensor([tokens])).logits[0]
    assert relative_error(sequences.step({0: len(tokens)})[0], expected) < 1e-5


def test_ready_tells_that_a_cpu_holds_rounded_weights(checkpoints: tuple[Path, Path]) -> None:
    settings = Settings(device="cpu", num_kvcache_blocks=8, max_model_len=256)
    config = ModelConfig.from_checkpoint(checkpoints[0])
    _, loaded = load(checkpoints[0], config, settings, CPU, TensorParallel(), lambda *_: None)
    assert loaded.detail.startswith("cpu, float32, projections rounded to FP8, ")


def test_scales_may_be_bf16_in_another_file_than_their_weights(
    checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    weights: dict[str, Tensor] = {}
    for file in checkpoints[0].glob("*.safetensors"):
        weights |= load_file(file)
    scales = {
        name: weights.pop(name).to(torch.bfloat16)
        for name in list(weights)
        if name.endswith("_scale_inv")
    }
    directory = tmp_path / "apart"
    directory.mkdir()
    shutil.copy(checkpoints[0] / "config.json", directory)
    save_file(weights, directory / "weights.safetensors")
    save_file(scales, directory / "scales.safetensors")
    files = dict.fromkeys(weights, "weights.safetensors") | dict.fromkeys(
        scales, "scales.safetensors"
    )
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    for tensor in load_model(directory).checkpoint_tensors():
        expected = weights[tensor.name]
        if tensor.projection:
            scale = scales[f"{tensor.name}_scale_inv"].float()
            expected = dequantize(Fp8Weight(expected, scale))
        assert torch.equal(whole(tensor.target), expected), tensor.name
    files["model.layers.0.mlp.up_proj.weight_scale_inv"] = "weights.safetensors"
    index.write_text(json.dumps({"weight_map": files}))
    with pytest.raises(CheckpointError, match=r"cannot read .*weights\.safetensors: .*up_proj"):
        load_model(directory)


def test_fp8_weights_of_which_the_config_does_not_tell_are_refused(
    checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    directory = tmp_path / "untold"
    shutil.copytree(checkpoints[0], directory)
    config = json.loads((directory / "config.json").read_bytes())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"_scale_inv .*has no quantization_config$"):
        load_model(directory)


def _reshape(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"{name}_scale_inv"] = torch.ones(1, 2)


def _convert(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].float()


def _drop(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[f"{name}_scale_inv"]


def _poison(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"{name}_scale_inv"][3, 1] = torch.nan


def _negate(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"{name}_scale_inv"].neg_()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_reshape, r"up_proj\.weight_scale_inv is F32 of shape \[1, 2\]; .* of shape \[4, 2\]"),
        (_convert, r"up_proj\.weight is F32; .*quantization_config says F8_E4M3"),
        (_drop, r"lacks .*\.up_proj\.weight_scale_inv; by config.json's quantization_config"),
        (_poison, r"up_proj\.weight_scale_inv has values that are negative or not finite"),
        (_negate, r"up_proj\.weight_scale_inv has values that are negative or not finite"),
    ],
)
def test_wrong_scales_are_named_by_every_rank(
    tmp_path: Path, damage: Callable[[dict[str, Tensor], str], None], reason: str
) -> None:
    directory = write_checkpoint(tmp_path, **SHAPE)
    store_in_fp8(directory)
    tensors = load_file(directory / "model.safetensors")
    damage(tensors, "model.layers.0.mlp.up_proj.weight")
    save_file(tensors, directory / "model.safetensors")
    for rank in range(2):
        with pytest.raises(CheckpointError, match=reason):
            load_model(directory, TensorParallel(rank, 2))
