"""What is read of a checkpoint, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanovllm.checkpoint import (
    DEMO_CHECKPOINT,
    CheckpointError,
    ModelConfig,
    eos_token_ids,
    model_name,
    resolve_model,
)

SHAPE: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def write(directory: Path, name: str = "config.json", **values: Any) -> Path:
    (directory / name).write_text(json.dumps(values))
    return directory


def test_the_older_and_the_newer_form_of_rope(tmp_path: Path) -> None:
    old = write(tmp_path, **SHAPE, rope_theta=1e6, rope_scaling={"type": "linear", "factor": 2.0})
    config = ModelConfig.from_checkpoint(old)
    assert (config.rope.rope_theta, config.rope.type, config.rope.factor) == (1e6, "linear", 2.0)
    new = {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}
    write(tmp_path, **SHAPE, rope_parameters=new)
    assert ModelConfig.from_checkpoint(tmp_path) == config
    write(tmp_path, **SHAPE, rope_theta=5e5, rope_scaling=None)
    assert ModelConfig.from_checkpoint(tmp_path).rope.rope_theta == 5e5


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"model_type": "llama"}, "'llama' model; only dense 'qwen2' and 'qwen3'"),
        ({"model_type": "qwen3_moe", "vocab_size": "x"}, "'qwen3_moe' model"),
        ({**SHAPE, "vocab_size": "many"}, "vocab_size"),
        ({**SHAPE, "hidden_act": "gelu"}, "hidden_act"),
        ({**SHAPE, "use_sliding_window": True}, "use_sliding_window"),
        ({**SHAPE, "layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'"),
        ({**SHAPE, "quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({**SHAPE, "dual_chunk_attention_config": {}}, "dual_chunk_attention_config"),
        ({**SHAPE, "head_dim": 0}, "must be positive"),
        ({**SHAPE, "num_key_value_heads": 3}, "num_key_value_heads"),
        ({**SHAPE, "rope_scaling": {"factor": "big"}}, "rope parameters"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    tmp_path: Path, values: dict[str, Any], complaint: str
) -> None:
    write(tmp_path, **values)
    with pytest.raises(CheckpointError, match=complaint) as error:
        ModelConfig.from_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("family", "head_dim"), [("qwen2", 8), ("qwen3", 128)])
def test_a_family_has_its_own_head_dim(tmp_path: Path, family: str, head_dim: int) -> None:
    write(tmp_path, **{**SHAPE, "model_type": family, "head_dim": None})
    assert ModelConfig.from_checkpoint(tmp_path).head_dim == head_dim


def test_a_directory_without_a_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        ModelConfig.from_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [3, 5, 6, 7])
def test_a_tp_that_does_not_divide_the_heads_is_refused(tmp_path: Path, size: int) -> None:
    config = ModelConfig.from_checkpoint(write(tmp_path, **SHAPE))
    with pytest.raises(CheckpointError, match=f"--tp {size}"):
        config.check_tensor_parallel(size)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_key_value_heads_may_be_fewer_than_ranks(tmp_path: Path, size: int) -> None:
    ModelConfig.from_checkpoint(write(tmp_path, **SHAPE)).check_tensor_parallel(size)


def test_end_of_sequence_ids_come_from_the_generation_config_first(tmp_path: Path) -> None:
    write(tmp_path, **SHAPE)
    assert eos_token_ids(tmp_path) is None
    write(tmp_path, **SHAPE, eos_token_id=5)
    assert eos_token_ids(tmp_path) == [5]
    write(tmp_path, "generation_config.json", eos_token_id=[7, 8])
    assert eos_token_ids(tmp_path) == [7, 8]
    write(tmp_path, "generation_config.json", temperature=0.6)
    assert eos_token_ids(tmp_path) == [5]


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model"):
        resolve_model(str(tmp_path / "nothing"))
    assert resolve_model(str(tmp_path)) == tmp_path.resolve()


@pytest.mark.parametrize(
    ("directory", "name"),
    [
        (DEMO_CHECKPOINT, "demo"),
        ("/models/Qwen3-0.6B", "Qwen3-0.6B"),
        ("/cache/hub/models--Qwen--Qwen3-0.6B/snapshots/c1899de289a0", "Qwen3-0.6B"),
        ("/cache/hub/models--someone--Qwen3--tuned/snapshots/c1899de289a0", "Qwen3--tuned"),
        ("/my/snapshots/today", "today"),
    ],
)
def test_a_model_has_the_name_that_people_know_it_by(directory: str | Path, name: str) -> None:
    assert model_name(Path(directory)) == name
