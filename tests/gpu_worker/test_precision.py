"""Half precision on a GPU: no further from float32 than transformers' own model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from benchmarks.support.random_model import store_in_fp8
from nanovllm.checkpoint import ModelConfig
from nanovllm.kernels.attention.choose import choose
from nanovllm.kernels.layers.fp8 import dequantize, dequantize_rows, quantize, quantize_rows
from nanovllm.services.gpu_worker.model.loader import load_checkpoint
from nanovllm.services.gpu_worker.model.parallel import TensorParallel
from nanovllm.services.gpu_worker.model.qwen3 import Qwen3ForCausalLM as Model
from nanovllm.services.gpu_worker.startup import allocate_kv_cache, attention_shape
from tests.checkpoints import write_checkpoint
from tests.gpu_worker.paged import batch_metadata

CUDA = torch.device("cuda", 0)
SHAPE: dict[str, Any] = {
    "vocab_size": 20_000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
BLOCK_SIZE = 256
TOKENS = 600


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["auto", "triton", "sdpa"])
@torch.inference_mode()
def test_logits_are_as_good_as_transformers(
    dtype: torch.dtype, attention: str, tmp_path: Path
) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint", dtype=dtype, **SHAPE)
    ids = torch.randint(SHAPE["vocab_size"], (1, TOKENS), device=CUDA)

    def of_transformers(precision: torch.dtype) -> torch.Tensor:
        model = Qwen3ForCausalLM.from_pretrained(directory, dtype=precision).to(CUDA).eval()
        logits: torch.Tensor = model(ids).logits[0].float()
        return logits

    expected = of_transformers(torch.float32)

    def error(logits: torch.Tensor) -> float:
        norm = torch.linalg.vector_norm
        return float(norm(logits.float() - expected) / norm(expected))

    ours = error(_logits(directory, ids[0], dtype, attention))
    # Either has its own rounding; equal but for that.
    assert ours < 1.05 * error(of_transformers(dtype))


def _logits(directory: Path, ids: torch.Tensor, dtype: torch.dtype, attention: str) -> torch.Tensor:
    """Of every token, the last one computed by itself, as a decode."""
    config, tp = ModelConfig.from_checkpoint(directory), TensorParallel()
    model = Model(config, TOKENS, tp, dtype, CUDA)
    load_checkpoint(model, directory, lambda done, total: None)
    shape = attention_shape(config, tp, BLOCK_SIZE)
    backend = choose(attention, shape, dtype, CUDA).backend
    blocks = -(-TOKENS // BLOCK_SIZE)
    cache = allocate_kv_cache(config, shape, blocks, dtype, CUDA)
    tables = torch.arange(blocks, dtype=torch.int32)[None]
    found = []
    for start, end in ((0, TOKENS - 1), (TOKENS - 1, TOKENS)):
        metadata = batch_metadata(tables, [end - start], [end], CUDA)
        positions = torch.arange(start, end, device=CUDA)
        hidden = model.forward(
            ids[start:end], positions, positions, backend.prepare(metadata), cache
        )
        found.append(model.logits(hidden))
    return torch.cat(found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@torch.inference_mode()
def test_fp8_logits_are_those_of_the_same_quantization(tmp_path: Path) -> None:
    """Many rows have quantized inputs, one row has not. Quantizing magnifies what bf16 rounds, so
    many rows are compared with transformers' bf16 model with quantized inputs."""
    directory = write_checkpoint(tmp_path / "checkpoint", dtype=torch.bfloat16, **SHAPE)
    store_in_fp8(directory)
    ids = torch.randint(SHAPE["vocab_size"], (1, TOKENS), device=CUDA)

    def of_transformers(precision: torch.dtype, quantized: bool = False) -> torch.Tensor:
        """Of the dequantized weights."""
        plain = write_checkpoint(tmp_path / "plain", dtype=torch.bfloat16, **SHAPE)
        model = Qwen3ForCausalLM.from_pretrained(plain, dtype=torch.float32).to(CUDA).eval()
        for name, module in model.named_modules():
            if name.endswith("_proj"):
                module.weight.copy_(dequantize(quantize(module.weight)))
                if quantized:
                    module.register_forward_pre_hook(_quantize_inputs)
        logits: torch.Tensor = model.to(precision)(ids).logits[0].float()
        return logits

    def error(logits: torch.Tensor, expected: torch.Tensor) -> float:
        norm = torch.linalg.vector_norm
        return float(norm(logits.float() - expected) / norm(expected))

    plain, quantized = of_transformers(torch.float32), of_transformers(torch.float32, True)
    bar = 1.5 * error(of_transformers(torch.bfloat16), plain)
    bar_many = 1.5 * error(of_transformers(torch.bfloat16, True), quantized)
    ours = _logits(directory, ids[0], torch.bfloat16, "auto")
    many, one = error(ours[:-1], quantized[:-1]), error(ours[-1:], plain[-1:])
    print(
        f"many rows {many:.4f}, bar {bar_many:.4f}; one row {one:.4f}, bar {bar:.4f};"
        f" between the two {error(quantized, plain):.4f}"
    )
    assert many < bar_many
    assert one < bar


def _quantize_inputs(module: torch.nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
    (x,) = args
    return dequantize_rows(quantize_rows(x.flatten(0, -2))).view_as(x).to(x.dtype)
