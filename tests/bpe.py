"""A tiny byte-level BPE tokenizer in Hugging Face format, and a checkpoint directory around it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

EOS = "<|im_end|>"
SPECIAL = ("<|endoftext|>", "<|im_start|>", EOS)
# Added tokens that are text: one as the vocabulary spells bytes, others as nothing else does.
ADDED = ("<think>", "</think>", "tab\there", "日本語", "naïve x")
CHAT_TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'critic' %}{{ raise_exception('no critics here') }}{% endif %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>' }}{% endif %}
"""
CORPUS = (
    "The quick brown fox jumps over the lazy dog, and the dog was not amused at all.",
    "naïve café façade über Straße, Ελληνικά και русский текст",
    "日本語のテキスト、漢字とかな。中文文本也在这里。",
    "emoji: 😀😃😄 👩‍👩‍👧‍👦 🇯🇵 👍🏽 done",
)


@cache
def tiny_tokenizer() -> Tokenizer:
    """400 tokens: all bytes, some merges (a few of which end inside characters), added tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS * 4,
        trainers.BpeTrainer(
            vocab_size=400 - len(SPECIAL) - len(ADDED),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    return tokenizer


def token_id(token: str) -> int:
    """Raises KeyError if the tokenizer has no such token."""
    return int(tiny_tokenizer().get_vocab()[token])


def write_tokenizer(directory: Path, **overrides: Any) -> Path:
    """Writes tokenizer.json and tokenizer_config.json (with `overrides`), returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer().save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": SPECIAL[0],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
        **overrides,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def write_checkpoint_files(directory: Path, **config: Any) -> Path:
    """A checkpoint without weights: all that services other than the workers read."""
    write_tokenizer(directory)
    values = {
        "model_type": "qwen3",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "eos_token_id": tiny_tokenizer().token_to_id(EOS),
        **config,
    }
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return directory
