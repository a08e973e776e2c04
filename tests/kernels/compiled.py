"""What Triton makes of kernels for an H100, on a machine without a GPU:
`python -m tests.kernels.compiled`, without TRITON_INTERPRET. Prints a JSON line: how many barriers
the kernels of one decode's attention have, by their names."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from nanovllm.kernels.attention import fused_decode
from nanovllm.kernels.attention.interface import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.kernels.layers import joined
from nanovllm.kernels.layers.ops import Heads, Norm

H100 = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    float: "fp32",
}
barriers: dict[str, int] = {}


def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """Instead of a launch."""
    given = dict(zip(kernel.arg_names, args, strict=False))
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        value = given[name] if name in given else options.pop(name)
        if parameter.is_constexpr:
            signature[name], constants[index,] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[index,] = TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = TYPES[type(value)]
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=H100, options=options)
    barriers[kernel.__name__] = made.asm["ptx"].count("bar.sync")


def attend(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """One decode's attention, with the projection after it."""
    shape = AttentionShape(num_heads, num_kv_heads, head_dim, 256)
    norm = Norm(torch.ones(head_dim, dtype=torch.bfloat16), 1e-6)
    cache = torch.zeros(2, shape.block_size, num_kv_heads, head_dim, dtype=torch.bfloat16)
    heads = Heads(
        torch.zeros(1, (num_heads + 2 * num_kv_heads) * head_dim, dtype=torch.bfloat16),
        norm,
        norm,
        torch.zeros(1, head_dim),
        LayerCache(cache, cache),
        torch.zeros(1, dtype=torch.int64),
    )
    one = np.ones(1, dtype=np.int32)
    ones = torch.ones(1, dtype=torch.int32)
    metadata = AttentionMetadata(1, one, one, torch.arange(2, dtype=torch.int32), ones, ones[None])
    tuning = fused_decode.choose_tuning(shape)
    if tuning is None:
        raise ValueError(f"no tuning for {shape}")
    parts = fused_decode.attend(heads, metadata, shape, tuning)
    weight = torch.zeros(1024, num_heads * head_dim, dtype=torch.bfloat16)
    joined.linear(parts, weight, torch.zeros(1, 1024, dtype=torch.bfloat16))


if __name__ == "__main__":
    JITFunction.run = compile_only
    attend(16, 8, 128)  # as Qwen3-0.6B
    print(json.dumps(barriers))
