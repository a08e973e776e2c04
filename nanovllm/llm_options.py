"""The keyword arguments of `LLM`, for editors and type checkers.

A test holds them to `Settings`.
"""

from __future__ import annotations

from typing import Literal, TypedDict


class LLMOptions(TypedDict, total=False):
    """The options of the pipeline that an `LLM` launches: those of `Settings`, which says what each
    is, less the two that an LLM sets by itself."""

    ingress: str
    insecure: bool
    keys: str
    services: str
    tensor_parallel_size: int
    engines: int
    gpus: str
    tokenizers: int
    detokenizers: int
    device: Literal["auto", "cuda", "cpu", "sim"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    quantization: Literal["auto", "fp8"]
    attention: Literal["auto", "flash-attn", "triton", "sdpa"]
    enforce_eager: bool
    gpu_memory_utilization: float
    sim_step_ms: float
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_prefill_tokens: int
    kvcache_block_size: int
    num_kvcache_blocks: int
    pipeline_depth: int
    max_message_bytes: int
    max_pending_requests: int
    drain_timeout: float
    otlp: str
    log_level: Literal["debug", "info", "warning", "error"]
    log_format: Literal["text", "json"]
