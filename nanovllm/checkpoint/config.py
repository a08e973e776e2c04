"""config.json: the model's shape, or why the model is not served."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from nanovllm.checkpoint.files import CheckpointError, read_json
from nanovllm.checkpoint.generation import read_eos_token_ids
from nanovllm.checkpoint.quantization import FP8_BLOCK, stores_fp8
from nanovllm.checkpoint.rope import Rope, RopeKeys, YarnRope, read_rope
from nanovllm.wording import counted


class Family(NamedTuple):
    """`architecture` is what config.json's `architectures` calls the causal language model.
    `head_dim` is the default one; None is hidden_size / num_attention_heads."""

    model_type: str
    architecture: str
    head_dim: int | None


FAMILIES = {
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", None),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", 128),
}
"""The families of models that are served, by `model_type`. gpu_worker/model/registry.py has a model
for each."""


class _Kind(msgspec.Struct):
    """What kind of model it is: looked at before the rest, whose keys depend on it."""

    model_type: str | None = None
    architectures: list[str] | None = None
    quantization_config: dict[str, Any] | None = None
    compression_config: dict[str, Any] | None = None


class _RawConfig(RopeKeys, kw_only=True):
    """config.json as written: the keys that are honoured, and keys that are refused if set."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    hidden_act: str = "silu"
    torch_dtype: str | None = None
    dtype: str | None = None

    use_sliding_window: bool | None = None
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    attention_chunk_size: int | None = None
    dual_chunk_attention_config: dict[str, Any] | None = None
    is_causal: bool = True
    use_bidirectional_attention: bool | None = None


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A dense decoder of one of FAMILIES.

    `attention_bias` is config.json's; a family may have biases without that key.
    `dtype`: None means the weights' own. `eos_token_ids`: None means the tokenizer's own
    end-of-sequence token. `stores_fp8`: the projections are FP8 in the checkpoint. `fp8`: they are
    FP8 in the model that is served.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    rope: Rope
    dtype: str | None
    eos_token_ids: tuple[int, ...] | None
    stores_fp8: bool
    fp8: bool

    @classmethod
    def from_checkpoint(
        cls, directory: Path, quantization: Literal["auto", "fp8"] = "auto"
    ) -> ModelConfig:
        """Reads config.json, and the end-of-sequence ids in generation_config.json.

        Args:
            quantization: see `Settings`.

        Raises:
            CheckpointError: if it is missing, malformed, not of one of FAMILIES, or asks for what
                is not served.
        """
        path = directory / "config.json"
        try:
            kind = read_json(path, _Kind)
        except FileNotFoundError:
            raise CheckpointError(f"{directory} has no config.json: not a checkpoint") from None
        family, stored = _family(path, kind), stores_fp8(path, kind.quantization_config)
        raw = read_json(path, _RawConfig)
        if refused := _refused(raw):
            raise CheckpointError(f"{path}: {refused} is not served")
        heads = raw.num_attention_heads
        kv_heads = heads if raw.num_key_value_heads is None else raw.num_key_value_heads
        head_dim = family.head_dim if raw.head_dim is None else raw.head_dim
        if head_dim is None:
            head_dim = raw.hidden_size // max(heads, 1)
        _check_sizes(path, raw, kv_heads, head_dim)
        return cls(
            model_type=family.model_type,
            vocab_size=raw.vocab_size,
            hidden_size=raw.hidden_size,
            intermediate_size=raw.intermediate_size,
            num_hidden_layers=raw.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=raw.rms_norm_eps,
            max_position_embeddings=raw.max_position_embeddings,
            tie_word_embeddings=raw.tie_word_embeddings,
            attention_bias=raw.attention_bias,
            rope=read_rope(path, raw, raw.max_position_embeddings),
            dtype=raw.dtype or raw.torch_dtype,
            eos_token_ids=read_eos_token_ids(directory, raw.vocab_size),
            stores_fp8=stored,
            fp8=stored or quantization == "fp8",
        )

    @property
    def context_length(self) -> int:
        """The longest sequence, in tokens. YaRN lengthens it beyond `max_position_embeddings`."""
        lengthened = self.rope.context_length if isinstance(self.rope, YarnRope) else 0
        return max(self.max_position_embeddings, lengthened)

    def check_tensor_parallel(self, size: int) -> None:
        """Raises CheckpointError where the model cannot be cut into `size` ranks."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % size:
            raise CheckpointError(
                f"--tp {size} does not divide the model's {heads} attention heads"
            )
        if self.intermediate_size % size:
            raise CheckpointError(
                f"--tp {size} does not divide intermediate_size {self.intermediate_size}"
            )
        if kv_heads % size and size % kv_heads:
            raise CheckpointError(
                f"--tp {size} and the model's {kv_heads} key/value heads: one must divide the other"
            )
        if self.fp8:
            self._check_blocks(size)

    def _check_blocks(self, size: int) -> None:
        """Raises CheckpointError where a rank of `size` would hold a part of an FP8 block."""
        ranks = f" on each of {size} ranks" if size > 1 else ""
        unquantized = (
            "take the checkpoint in bfloat16"
            if self.stores_fp8
            else "leave --quantization fp8 away"
        )
        for name, value in (
            ("hidden_size", self.hidden_size),
            (f"intermediate_size{ranks}", self.intermediate_size // size),
            (f"width of the query heads{ranks}", self.num_attention_heads * self.head_dim // size),
            (
                f"width of the key/value heads{ranks}",
                max(1, self.num_key_value_heads // size) * self.head_dim,
            ),
        ):
            if value % FP8_BLOCK:
                fewer = "lower --tp, or " if ranks and name.endswith(ranks) else ""
                raise CheckpointError(
                    f"FP8 weights have blocks of {FP8_BLOCK}, and the {name}, {value}, is no"
                    f" multiple: {fewer}{unquantized}"
                )


def _family(path: Path, kind: _Kind) -> Family:
    """Raises CheckpointError for a model that is not of FAMILIES."""
    served = " and ".join(map(repr, FAMILIES))
    if not kind.model_type:
        raise CheckpointError(f"{path} has no model_type; only dense {served} models are served")
    family = FAMILIES.get(kind.model_type)
    if family is None:
        raise CheckpointError(
            f"{path.parent} is a {kind.model_type!r} model; only dense {served} are served"
        )
    if kind.architectures and family.architecture not in kind.architectures:
        raise CheckpointError(
            f"{path}: architectures {', '.join(kind.architectures)} is not served; only the causal"
            f" language model {family.architecture} is"
        )
    if kind.compression_config is not None:
        raise CheckpointError(
            f"{path}: compression_config: quantized weights are not served; take the model's"
            " checkpoint in bfloat16, float16 or float32"
        )
    return family


def _refused(raw: _RawConfig) -> str | None:
    """What config.json asks for and no family honours."""
    if raw.hidden_act != "silu":
        return f"hidden_act {raw.hidden_act!r}"
    if raw.use_sliding_window:
        return "use_sliding_window"
    if raw.sliding_window is not None and raw.use_sliding_window is None:
        return f"sliding_window {raw.sliding_window} without use_sliding_window false"
    if raw.layer_types is not None:
        if other := set(raw.layer_types) - {"full_attention", "attention"}:
            return f"layer_types {min(other)!r}"
        if len(raw.layer_types) != raw.num_hidden_layers:
            layers = f"{raw.num_hidden_layers} num_hidden_layers"
            return f"layer_types of {counted(len(raw.layer_types), 'layer')}, with {layers},"
    if raw.attention_chunk_size is not None:
        return f"attention_chunk_size {raw.attention_chunk_size}"
    if raw.dual_chunk_attention_config is not None:
        return "dual_chunk_attention_config"
    if not raw.is_causal or raw.use_bidirectional_attention:
        return "attention that is not causal (is_causal, use_bidirectional_attention)"
    return None


def _check_sizes(path: Path, raw: _RawConfig, kv_heads: int, head_dim: int) -> None:
    heads = raw.num_attention_heads
    for name, size in (
        ("vocab_size", raw.vocab_size),
        ("hidden_size", raw.hidden_size),
        ("intermediate_size", raw.intermediate_size),
        ("num_hidden_layers", raw.num_hidden_layers),
        ("num_attention_heads", heads),
        ("num_key_value_heads", kv_heads),
        ("head_dim", head_dim),
    ):
        if size < 1:
            raise CheckpointError(f"{path}: {name} {size}: it must be positive")
    if heads % kv_heads:
        raise CheckpointError(
            f"{path}: num_attention_heads {heads} must be a multiple of num_key_value_heads"
            f" {kv_heads}"
        )
    if head_dim % 2:
        raise CheckpointError(f"{path}: head_dim {head_dim}: it must be even, for rotary positions")
    if raw.max_position_embeddings < 2:
        raise CheckpointError(
            f"{path}: max_position_embeddings {raw.max_position_embeddings}: it must be at least 2,"
            " a prompt's token and an output's"
        )
