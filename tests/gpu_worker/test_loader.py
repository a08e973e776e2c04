"""Loading: every rank gets its own slices, and a checkpoint at fault is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nanovllm.checkpoint import CheckpointError, ModelConfig
from nanovllm.kernels.layers.ops import whole
from nanovllm.services.gpu_worker.model import loader
from nanovllm.services.gpu_worker.model.loader import as_stored, load_checkpoint
from nanovllm.services.gpu_worker.model.parallel import TensorParallel
from nanovllm.services.gpu_worker.model.registry import build_model
from nanovllm.services.gpu_worker.startup import choose_dtype
from nanovllm.settings import Settings
from tests.checkpoints import read_model, write_checkpoint
from tests.gpu_worker.paged import CPU, PagedSequences, load_model, relative_error


def all_tensors(directory: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in directory.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "shape", [{"tie_word_embeddings": True}, {"attention_bias": True}], ids=["tied", "bias"]
)
def test_the_ranks_parts_make_up_the_checkpoint(
    size: int, shards: int, shape: dict[str, Any], tmp_path: Path
) -> None:
    directory = write_checkpoint(tmp_path, shards=shards, **shape)
    parts: dict[str, list[Tensor]] = {}
    dims: dict[str, int | None] = {}
    for rank in range(size):
        model = load_model(directory, TensorParallel(rank, size))
        for tensor in model.checkpoint_tensors():
            parts.setdefault(tensor.name, []).append(whole(tensor.target))
            dims[tensor.name] = tensor.dim
    stored = all_tensors(directory)
    assert set(parts) == set(stored)
    for name, pieces in parts.items():
        dim = dims[name]
        if dim is None:
            assert all(torch.equal(piece, stored[name]) for piece in pieces)
            continue
        if name.split(".")[-2] in ("k_proj", "v_proj"):
            # Two key/value heads: where there are more ranks, neighbours hold the same one.
            copies = max(1, size // 2)
            groups = [pieces[i : i + copies] for i in range(0, size, copies)]
            assert all(torch.equal(piece, group[0]) for group in groups for piece in group)
            pieces = pieces[::copies]
        assert torch.equal(torch.cat(pieces, dim), stored[name])


def test_a_padded_vocabulary_shard_ends_in_zeros(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, vocab_size=515)
    model = load_model(directory, TensorParallel(3, 4))
    assert model.head.weight.shape[0] == 129
    assert model.head.rows == 515 - 3 * 129
    assert not model.head.weight[model.head.rows :].any()


def test_a_vocabulary_smaller_than_the_ranks_leaves_the_last_empty(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, vocab_size=9)
    model = load_model(directory, TensorParallel(7, 8))
    assert model.head.rows == 0
    assert not model.head.weight.any()


def test_weights_are_converted_and_progress_reaches_its_total(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, shards=3)
    config = ModelConfig.from_checkpoint(directory)
    model = build_model(config, 1, TensorParallel(), torch.bfloat16, CPU)
    seen: list[tuple[int, int]] = []
    load_checkpoint(model, directory, lambda done, total: seen.append((done, total)))
    tensors = list(model.checkpoint_tensors())
    total = sum(tensor.target.nbytes for tensor in tensors)
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {of for _, of in seen} == {total}
    stored = all_tensors(directory)
    for tensor in tensors:
        assert torch.equal(whole(tensor.target), stored[tensor.name].to(torch.bfloat16))


def test_a_tied_checkpoint_may_repeat_its_head(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, tie_word_embeddings=True)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    load_model(directory)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_tied_checkpoint_with_a_head_of_its_own_is_as_for_transformers(
    tmp_path: Path, shards: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "COMPARED_VALUES", 640)  # 10 rows
    directory = write_checkpoint(tmp_path, tie_word_embeddings=False, shards=shards)
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": True}))
    sequences = [[1, 2, 3, 514]]
    with torch.inference_mode():
        expected = read_model(directory)(torch.tensor(sequences)).logits[0]
    caplog.clear()
    found = PagedSequences(load_model(directory), sequences, 16).run(16)[0]
    assert relative_error(found, expected) < 1e-4
    (warning,) = caplog.records
    assert "tie_word_embeddings" in warning.message


def test_heads_differ_where_one_value_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "COMPARED_VALUES", 640)
    directory = write_checkpoint(tmp_path, tie_word_embeddings=True)
    config = ModelConfig.from_checkpoint(directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    head = tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    assert as_stored(config, directory).tie_word_embeddings
    head[514, 63] += 1
    save_file(tensors, file)
    assert not as_stored(config, directory).tie_word_embeddings


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_say_their_dtype_where_the_config_does_not(
    tmp_path: Path, stored: torch.dtype
) -> None:
    directory = write_checkpoint(tmp_path, dtype=stored)
    values = json.loads((directory / "config.json").read_text())
    del values["dtype"]
    (directory / "config.json").write_text(json.dumps(values))
    config = as_stored(ModelConfig.from_checkpoint(directory), directory)
    assert choose_dtype(Settings(), config, torch.device("cuda")) == stored
    assert choose_dtype(Settings(), config, CPU) == torch.float32
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert theirs.dtype == stored


def _drop(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def _drop_many(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if "layers.1" in name]:
        del tensors[name]


def _add(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.7.extra"] = torch.zeros(1)


def _reshape(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(3)


def _quantize(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)


def _drop_prefixes(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def _halve_heads(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("q_proj.weight")]:
        tensors[name] = tensors[name][:64].clone()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            _drop_prefixes,
            r"lacks .*names lack 'model\.', as those of a model that makes embeddings",
        ),
        (_halve_heads, r"q_proj\.weight has shape \[64, 64\]; .* head_dim 16: is it 8\?"),
        (_drop, r"lacks model\.layers\.1\.mlp\.up_proj\.weight$"),
        (_drop_many, r"lacks model\.layers\.1\.input_layernorm\.weight, .* and 8 more$"),
        (_add, r"does not call for: model\.layers\.7\.extra$"),
        (_reshape, r"model\.norm\.weight has shape \[3\]; config\.json says \[64\]"),
        (_quantize, r"model\.layers\.0\.mlp\.up_proj\.weight is I8; only BF16"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_tensor_is_named(damage: Any, reason: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=reason):
        load_model(directory)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        load_model(directory)


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
        load_model(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00002-of-00003.safetensors"])
def test_a_file_that_git_lfs_did_not_fetch_is_named(tmp_path: Path, name: str) -> None:
    directory = write_checkpoint(tmp_path, shards=1 if name == "model.safetensors" else 3)
    (directory / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4f\n")
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        load_model(directory)


def test_a_checkpoint_without_weights_says_what_is_looked_for(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load_model(directory)


def test_a_single_file_comes_before_an_index(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, shards=3)
    single = write_checkpoint(tmp_path / "single", seed=1) / "model.safetensors"
    single.rename(directory / "model.safetensors")
    wanted = read_model(directory).state_dict()
    for _ in range(2):
        for tensor in load_model(directory).checkpoint_tensors():
            assert torch.equal(whole(tensor.target), wanted[tensor.name])
        for shard in directory.glob("model-*"):
            shard.unlink()


def test_a_malformed_index_is_named(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, shards=3)
    index = directory / "model.safetensors.index.json"
    index.write_bytes(msgspec.json.encode({"weight_map": [1]}))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load_model(directory)
