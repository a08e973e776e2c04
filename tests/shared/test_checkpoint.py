"""What is read of a checkpoint, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import FineGrainedFP8Config

from benchmarks.support.random_model import FP8_CONFIG
from nanovllm.checkpoint import (
    DEMO_CHECKPOINT,
    CheckpointError,
    ModelConfig,
    model_name,
    resolve_model,
)
from nanovllm.checkpoint.rope import LinearRope
from nanovllm.service import settled
from nanovllm.settings import Settings

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


SIZES = [name for name, value in SHAPE.items() if isinstance(value, int)]
FULL = ["full_attention", "full_attention"]


def write(directory: Path, name: str = "config.json", **values: Any) -> Path:
    (directory / name).write_text(json.dumps(values))
    return directory


def test_the_older_and_the_newer_form_of_rope(tmp_path: Path) -> None:
    old = write(tmp_path, **SHAPE, rope_theta=1e6, rope_scaling={"type": "linear", "factor": 2.0})
    config = ModelConfig.from_checkpoint(old)
    assert config.rope == LinearRope(rope_theta=1e6, factor=2.0)
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
        ({**SHAPE, "sliding_window": 64}, "sliding_window 64 without use_sliding_window"),
        ({**SHAPE, "layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'"),
        ({**SHAPE, "layer_types": []}, "layer_types of 0 layers, with 2 num_hidden_layers"),
        ({**SHAPE, "layer_types": FULL[:1]}, "layer_types of 1 layer, with 2"),
        ({**SHAPE, "layer_types": FULL * 2}, "layer_types of 4 layers, with 2"),
        ({**SHAPE, "layer_types": "full_attention"}, "layer_types: Expected `array"),
        ({**SHAPE, "attention_chunk_size": 64}, "attention_chunk_size"),
        ({**SHAPE, "is_causal": False}, "not causal"),
        ({**SHAPE, "use_bidirectional_attention": True}, "not causal"),
        ({"vocab_size": 5}, r"config\.json has no model_type"),
        ({**SHAPE, "architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClass"),
        ({**SHAPE, "architectures": ["Qwen3Model"]}, "architectures Qwen3Model is not served"),
        ({**SHAPE, "architectures": ["Qwen2ForCausalLM"]}, "only .* Qwen3ForCausalLM is"),
        *(
            (
                {**SHAPE, "quantization_config": {"quant_method": method}},
                rf"\({method}\): such quantized",
            )
            for method in ("gptq", "awq", "compressed-tensors", "bitsandbytes")
        ),
        *(
            ({**SHAPE, "quantization_config": {**FP8_CONFIG, **keys}}, rf"\(fp8\): {reason}")
            for keys, reason in (
                ({"weight_block_size": [64, 128]}, r"weight_block_size \[64, 128\]: only"),
                ({"weight_block_size": None}, "weight_block_size: .*served is e4m3"),
                ({"fmt": "e5m2"}, "fmt: .*served is e4m3"),
                ({"activation_scheme": "static"}, "activation_scheme: .*dynamic"),
                ({"scale_fmt": "ue8m0"}, ".*scale_fmt.*served is e4m3"),
                ({"weight_per_tensor": True}, ".*weight_per_tensor.*served is e4m3"),
                ({"kv_cache_scheme": {}}, ".*kv_cache_scheme.*served is e4m3"),
                ({"modules_to_not_convert": ["lm_head", "mlp"]}, ".*has 'mlp': only"),
            )
        ),
        ({**SHAPE, "compression_config": {}}, "compression_config: quantized weights"),
        ({**SHAPE, "max_position_embeddings": 0}, "max_position_embeddings 0: .* at least 2"),
        ({**SHAPE, "max_position_embeddings": 1}, "max_position_embeddings 1: .* at least 2"),
        ({**SHAPE, "head_dim": 31}, "head_dim 31: it must be even"),
        *(
            ({**SHAPE, name: size}, f"{name} {size}: it must be positive")
            for name in SIZES
            for size in (0, -3)
        ),
        ({**SHAPE, "dual_chunk_attention_config": {}}, "dual_chunk_attention_config"),
        ({**SHAPE, "num_key_value_heads": 3}, "num_key_value_heads"),
        ({**SHAPE, "rope_scaling": {"factor": "big"}}, "rope_scaling"),
    ],
)
def test_an_unsupported_checkpoint_is_refused_in_one_line(
    tmp_path: Path, values: dict[str, Any], complaint: str
) -> None:
    write(tmp_path, **values)
    with pytest.raises(CheckpointError, match=complaint) as error:
        ModelConfig.from_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"layer_types": FULL},
        {"layer_types": None, "use_sliding_window": False, "sliding_window": 64},
        {"sliding_window": None},
    ],
)
def test_full_attention_on_every_layer_is_served(tmp_path: Path, values: dict[str, Any]) -> None:
    plain = ModelConfig.from_checkpoint(write(tmp_path, **SHAPE))
    assert ModelConfig.from_checkpoint(write(tmp_path, **SHAPE, **values)) == plain


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def without(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


@pytest.mark.parametrize(
    ("rope", "complaint"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic' is not served; these are: default"),
        ({"rope_type": ["yarn"]}, "is not served"),
        ({"full_attention": YARN}, r"a map for each layer type \(full_attention\) is not served"),
        (without(YARN, "factor"), "`factor`"),
        ({**without(YARN, "factor"), "facter": 4.0}, "`facter`|`factor`"),
        ({**YARN, "facter": 4.0}, "`facter`"),
        ({**YARN, "factor": None}, "`factor`"),
        ({**YARN, "factor": 0}, "factor: .* >= 1"),
        ({**YARN, "factor": -4.0}, "factor: .* >= 1"),
        ({**YARN, "original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ({**YARN, "attention_factor": 0.0}, "attention_factor"),
        ({**YARN, "beta_fast": 1.0, "beta_slow": 32.0}, "beta_fast must not be below"),
        ({**YARN, "type": "linear"}, "`type`"),
        ({"rope_type": "linear"}, "`factor`"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32.0}, "`beta_fast`"),
        ({"factor": 4.0}, "'default': .*`factor`"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (without(LLAMA3, "low_freq_factor"), "`low_freq_factor`"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor must be above low_freq_factor"),
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_that_is_not_served_is_named(
    tmp_path: Path, rope: dict[str, Any], complaint: str, key: str
) -> None:
    write(tmp_path, **{**SHAPE, key: rope})
    with pytest.raises(CheckpointError, match=rf"config\.json: {key}\b.*({complaint})"):
        ModelConfig.from_checkpoint(tmp_path)


def test_two_maps_of_rope_must_agree_on_theta(tmp_path: Path) -> None:
    write(tmp_path, **SHAPE, rope_parameters={"rope_theta": 1e6}, rope_scaling=YARN)
    with pytest.raises(CheckpointError, match=r"10000[.]0, and rope_parameters 1000000[.]0"):
        ModelConfig.from_checkpoint(tmp_path)
    both = {**YARN, "rope_theta": 1e6}
    write(tmp_path, **SHAPE, rope_parameters={"rope_theta": 1e6}, rope_scaling=both)
    assert ModelConfig.from_checkpoint(tmp_path).rope.rope_theta == 1e6


@pytest.mark.parametrize(
    ("positions", "rope", "longest"),
    [
        (512, YARN, 2048),
        (640, YARN, 2048),
        (2048, YARN, 2048),
        (512, without(YARN, "original_max_position_embeddings"), 2048),
        (512, {"rope_type": "linear", "factor": 4.0}, 512),
        (512, {}, 512),
    ],
)
def test_yarn_lengthens_the_context(
    tmp_path: Path,
    positions: int,
    rope: dict[str, Any],
    longest: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write(tmp_path, **SHAPE, max_position_embeddings=positions, rope_scaling=rope)
    config = ModelConfig.from_checkpoint(tmp_path)
    assert settled(Settings(max_model_len=100), tmp_path, config).max_model_len == 100
    assert settled(Settings(max_model_len=longest), tmp_path, config).max_model_len == longest
    assert not caplog.records
    assert settled(Settings(max_model_len=4096), tmp_path, config).max_model_len == longest
    (said,) = caplog.records
    assert said.message.startswith(f"--max-model-len 4096 is cut to {longest}: the model has no")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer.*git lfs pull"),
        (b'{"model_type": ', "is not valid JSON"),
        (b"\xff\xfe{\x00}\x00", "is not valid JSON"),
        (b'{"x": ' + b"[" * 100_000, "is not valid JSON"),
        (b"[]", "Expected `object`"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_file_that_is_no_json_is_named(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    write(tmp_path, **SHAPE)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}.*{complaint}") as error:
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


@pytest.mark.parametrize(
    ("sizes", "tp", "reason"),
    [
        ({"num_key_value_heads": 1}, 1, "key/value heads, 64, is no multiple: "),
        ({"hidden_size": 192}, 1, "the hidden_size, 192, is no multiple: "),
        ({"hidden_size": 192}, 2, "the hidden_size, 192, is no multiple: "),
        (
            {"intermediate_size": 640},
            2,
            "the intermediate_size on each of 2 ranks, 320, .*: lower --tp, or ",
        ),
        ({"head_dim": 32}, 2, "query heads on each of 2 ranks, 64, .*: lower --tp, or "),
    ],
)
def test_ranks_hold_whole_fp8_blocks(
    tmp_path: Path, sizes: dict[str, int], tp: int, reason: str
) -> None:
    fits = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    keys: dict[str, Any] = {
        **SHAPE,
        **fits,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **sizes,
    }
    for quantization_config, remedy in (
        (None, "leave --quantization fp8 away"),
        (FP8_CONFIG, "take the checkpoint in bfloat16"),
    ):
        path = write(tmp_path, **keys, quantization_config=quantization_config)
        config = ModelConfig.from_checkpoint(path, quantization="fp8")
        with pytest.raises(CheckpointError, match=f"{reason}{remedy}$"):
            config.check_tensor_parallel(tp)


@pytest.mark.parametrize(
    "keys",
    [
        {"modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm", "model.norm"]},
        {"weight_per_tensor": False, "act_per_tensor": False},
        FineGrainedFP8Config().to_dict(),
        FineGrainedFP8Config(modules_to_not_convert=["lm_head"]).to_dict(),
    ],
)
def test_fp8_is_told_in_several_ways(tmp_path: Path, keys: dict[str, Any]) -> None:
    told = {**FP8_CONFIG, **keys}
    assert ModelConfig.from_checkpoint(write(tmp_path, **SHAPE, quantization_config=told)).fp8


def test_end_of_sequence_ids_come_from_the_generation_config_first(tmp_path: Path) -> None:
    def eos(**config: Any) -> tuple[int, ...] | None:
        return ModelConfig.from_checkpoint(write(tmp_path, **SHAPE, **config)).eos_token_ids

    assert eos() is None
    assert eos(eos_token_id=5) == (5,)
    write(tmp_path, "generation_config.json", eos_token_id=[7, 8])
    assert eos(eos_token_id=5) == (7, 8)
    write(tmp_path, "generation_config.json", temperature=0.6)
    assert eos(eos_token_id=5) == (5,)


@pytest.mark.parametrize("token_id", [-1, 100, 5000, 2**40])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_of_sequence_out_of_range_is_refused(
    tmp_path: Path, name: str, token_id: int
) -> None:
    write(tmp_path, **SHAPE)
    values = SHAPE if name == "config.json" else {}
    for given in (token_id, [7, token_id]):
        write(tmp_path, name, **values, eos_token_id=given)
        with pytest.raises(CheckpointError, match=rf"{name}: eos_token_id {token_id} is not"):
            ModelConfig.from_checkpoint(tmp_path)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model"):
        resolve_model(str(tmp_path / "nothing"))
    assert resolve_model(str(tmp_path)) == tmp_path.resolve()


def test_a_path_that_is_no_checkpoint_is_refused_by_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    for name in (str(file), "owner/model.gguf"):
        with pytest.raises(CheckpointError, match=r"model\.gguf is a GGUF file.*not served"):
            resolve_model(name)
    file.touch()
    with pytest.raises(CheckpointError, match=f"^{tmp_path} has only GGUF files"):
        resolve_model(str(tmp_path))
    weights = tmp_path / "model.safetensors"
    weights.touch()
    with pytest.raises(CheckpointError, match="is a file: name the directory"):
        resolve_model(str(weights))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"^owner/m-GGUF has no config\.json.*GGUF"):
        resolve_model("owner/m-GGUF")


def test_without_a_way_to_the_hub_the_error_says_what_to_do(tmp_path: Path) -> None:
    ask = "from nanovllm.checkpoint import resolve_model; resolve_model('owner/name')"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", ask], env={**os.environ, **offline}, capture_output=True, text=True
    )
    assert "`hf download owner/name --local-dir DIRECTORY`" in ran.stderr.splitlines()[-1]


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
