"""config.json: the model's shape, or why the model is not served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from nanovllm.checkpoint.files import CheckpointError
from nanovllm.checkpoint.rope import Rope, RopeKeys, YarnRope, read_rope

FAMILIES: dict[str, int | None] = {"qwen2": None, "qwen3": 128}
"""The families of models that are served, by `model_type`, with each family's default `head_dim`;
None is hidden_size / num_attention_heads. gpu_worker/model/registry.py has a model for each."""


class _RawConfig(RopeKeys, kw_only=True):
    """config.json as written: the keys that are honoured, and keys that are refused if set."""

    model_type: str = ""
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
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    quantization_config: dict[str, Any] | None = None
    dual_chunk_attention_config: dict[str, Any] | None = None
    torch_dtype: str | None = None
    dtype: str | None = None
    eos_token_id: int | list[int] | None = None


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of a dense decoder of one of FAMILIES.

    `attention_bias` is config.json's; a family may have biases without that key.
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
    dtype: str

    @classmethod
    def from_checkpoint(cls, directory: Path) -> ModelConfig:
        """Reads `directory/config.json`.

        Raises:
            CheckpointError: if it is missing, malformed, not of one of FAMILIES, or asks for what
                is not served.
        """
        path = directory / "config.json"
        try:
            raw = msgspec.json.decode(path.read_bytes(), type=_RawConfig)
        except FileNotFoundError:
            raise CheckpointError(f"{directory} has no config.json: not a checkpoint") from None
        except msgspec.ValidationError as error:
            if (found := _model_type(path)) not in FAMILIES:
                raise CheckpointError(_wrong_architecture(directory, found)) from None
            raise CheckpointError(f"{path}: {error}") from None
        except msgspec.DecodeError as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}") from None
        if raw.model_type not in FAMILIES:
            raise CheckpointError(_wrong_architecture(directory, raw.model_type))
        if refused := _refused(raw):
            raise CheckpointError(f"{path}: {refused} is not served")
        heads = raw.num_attention_heads
        kv_heads = heads if raw.num_key_value_heads is None else raw.num_key_value_heads
        head_dim = FAMILIES[raw.model_type] if raw.head_dim is None else raw.head_dim
        if head_dim is None:
            head_dim = raw.hidden_size // max(heads, 1)
        sizes = (raw.vocab_size, raw.hidden_size, raw.intermediate_size, raw.num_hidden_layers)
        if min(*sizes, heads, kv_heads, head_dim) < 1 or heads % kv_heads:
            raise CheckpointError(
                f"{path}: sizes must be positive, and num_attention_heads ({heads}) a multiple"
                f" of num_key_value_heads ({kv_heads})"
            )
        return cls(
            model_type=raw.model_type,
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
            dtype=raw.dtype or raw.torch_dtype or "float32",
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


class _TypeOnly(msgspec.Struct):
    model_type: str = ""


def _model_type(path: Path) -> str:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_TypeOnly).model_type
    except msgspec.DecodeError:
        return ""


def _wrong_architecture(directory: Path, found: str) -> str:
    served = " and ".join(map(repr, FAMILIES))
    return f"{directory} is a {found or 'nameless'!r} model; only dense {served} are served"


def _refused(raw: _RawConfig) -> str | None:
    """What config.json asks for and no family honours."""
    if raw.hidden_act != "silu":
        return f"hidden_act {raw.hidden_act!r}"
    if raw.use_sliding_window:
        return "use_sliding_window"
    if other := set(raw.layer_types or ()) - {"full_attention"}:
        return f"layer_types {min(other)!r}"
    if raw.quantization_config is not None:
        return "quantization_config"
    if raw.dual_chunk_attention_config is not None:
        return "dual_chunk_attention_config"
    return None
