"""The model gives transformers' own logits, however its tokens are scheduled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from nanovllm.checkpoint import FAMILIES, CheckpointError, ModelConfig
from nanovllm.kernels.layers.ops import rotate
from nanovllm.services.gpu_worker.model.layers import rope_frequencies, rotations
from nanovllm.services.gpu_worker.model.parallel import TensorParallel
from nanovllm.services.gpu_worker.model.registry import MODELS, Model, build_model
from tests.checkpoints import read_model, write_checkpoint
from tests.gpu_worker.paged import CPU, PagedSequences, load_model, relative_error

TOLERANCE = 1e-4

SHAPES: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "three shards": {"shards": 3},
    "mha, head_dim above hidden / heads": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
    },
    "gqa 8": {"num_key_value_heads": 1, "head_dim": 24},
    "bias": {"attention_bias": True},
    "qwen2": {"family": "qwen2"},
    "qwen2, tied, 7 query heads a KV head": {
        "family": "qwen2",
        "tie_word_embeddings": True,
        "hidden_size": 112,
        "num_attention_heads": 14,
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


def random_tokens(*lengths: int, vocab: int = 515) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


def expected_logits(directory: Path, sequences: list[list[int]]) -> list[torch.Tensor]:
    reference = read_model(directory)
    with torch.inference_mode():
        return [reference(torch.tensor([tokens])).logits[0] for tokens in sequences]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_equal_transformers(shape: dict[str, Any], tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, **shape)
    sequences = random_tokens(1, 16, 33, 77)
    expected = expected_logits(directory, sequences)
    model = load_model(directory)
    for block_size, chunk in ((16, 1000), (16, 1), (256, 1000), (5, 16)):
        for found, wanted in zip(
            PagedSequences(model, sequences, block_size).run(chunk), expected, strict=True
        ):
            assert found.dtype == torch.float32
            assert relative_error(found, wanted) < TOLERANCE


def test_every_family_has_a_model() -> None:
    assert set(MODELS) == set(FAMILIES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


LENGTHS = (1, 20, 45)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[Model, list[list[int]], list[torch.Tensor]]:
    sequences = random_tokens(*LENGTHS)
    return load_model(checkpoint), sequences, expected_logits(checkpoint, sequences)


@settings(max_examples=25)
@given(
    block_size=st.integers(1, 20),
    chunks=st.lists(
        st.tuples(*[st.integers(0, length) for length in LENGTHS]), min_size=1, max_size=12
    ),
)
def test_any_ragged_schedule_gives_the_same_logits(
    loaded: tuple[Model, list[list[int]], list[torch.Tensor]],
    block_size: int,
    chunks: list[tuple[int, ...]],
) -> None:
    model, sequences, expected = loaded
    paged = PagedSequences(model, sequences, block_size)
    for sizes in [*chunks, LENGTHS]:
        left = [
            min(size, len(tokens) - done)
            for size, tokens, done in zip(sizes, sequences, paged.computed, strict=True)
        ]
        step = {index: size for index, size in enumerate(left) if size}
        if not step:
            continue
        for index, logits in paged.step(step).items():
            end = paged.computed[index]
            assert relative_error(logits, expected[index][end - step[index] : end]) < TOLERANCE


def test_bfloat16_weights_in_float32_equal_transformers(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, dtype=torch.bfloat16)
    sequences = random_tokens(30)
    found = PagedSequences(load_model(directory), sequences, 16).run(7)[0]
    assert relative_error(found, expected_logits(directory, sequences)[0]) < TOLERANCE


def test_sizes_that_tensor_parallelism_cannot_cut_are_refused(checkpoint: Path) -> None:
    config = ModelConfig.from_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match="--tp 3 does not divide"):
        build_model(config, 1, TensorParallel(0, 3), torch.float32, CPU)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 1e6},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 16.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "truncate": False,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 2.0,
        "original_max_position_embeddings": 2048,
        "attention_factor": 0.9,
    },
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_rope_equals_transformers(rope: dict[str, Any], tmp_path: Path) -> None:
    reference_config = Qwen3Config(
        head_dim=64, max_position_embeddings=4096, rope_parameters=dict(rope)
    )
    reference_config.save_pretrained(tmp_path)
    config = ModelConfig.from_checkpoint(tmp_path)
    positions = torch.arange(0, 5000, 7)
    cos, sin = rotations(config, 5000, CPU)[positions].chunk(2, dim=-1)
    wanted_cos, wanted_sin = Qwen3RotaryEmbedding(reference_config)(torch.zeros(1), positions[None])
    # An ulp of a frequency, times thousands of positions.
    torch.testing.assert_close(cos, wanted_cos[0, :, :32], rtol=0, atol=2e-3)
    torch.testing.assert_close(sin, wanted_sin[0, :, :32], rtol=0, atol=2e-3)
    reference_frequencies = Qwen3RotaryEmbedding(reference_config).inv_freq
    torch.testing.assert_close(
        rope_frequencies(config.rope, 64)[0], reference_frequencies, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "rope_scaling": YARN},
        {"rope_theta": 5e5, "rope_scaling": YARN},
        {"rope_theta": 5e5, "rope_scaling": {**YARN, "rope_theta": 7e5}},
        {"rope_theta": 5e5, "rope_scaling": {}, "rope_parameters": YARN},
        {"rope_theta": 5e5, "rope_parameters": None},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "rope_type": "yarn"}},
        {"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": None}},
        {"original_max_position_embeddings": 32, "rope_scaling": YARN},
    ],
)
def test_where_rope_is_read_from(keys: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, max_position_embeddings=512)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    del values["rope_parameters"]
    file.write_text(json.dumps({**values, **keys}))
    reference = Qwen3RotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    config = ModelConfig.from_checkpoint(tmp_path)
    frequencies, scale = rope_frequencies(config.rope, config.head_dim)
    torch.testing.assert_close(frequencies, reference.inv_freq, rtol=1e-6, atol=0)
    assert scale == pytest.approx(reference.attention_scaling)


def test_rotation_keeps_lengths_and_relative_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 16, generator=generator)
    frequencies = torch.rand(8, generator=generator)

    def at(position: int, row: int) -> torch.Tensor:
        angles = (position * frequencies)[None]
        return rotate(x[row : row + 1], torch.cat((angles.cos(), angles.sin()), dim=-1))[0, 0]

    torch.testing.assert_close(at(9, 0).norm(), x[0].norm())
    torch.testing.assert_close(at(9, 0) @ at(4, 1), at(25, 0) @ at(20, 1), rtol=1e-4, atol=1e-4)
