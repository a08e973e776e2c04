"""The checkpoint's tokenizer files: tokenizer.json, tokenizer_config.json, chat_template.jinja."""

from __future__ import annotations

from pathlib import Path

import msgspec
from tokenizers import Tokenizer

from nanovllm.checkpoint.files import CheckpointError, read_json, refuse_pointer


class AddedToken(msgspec.Struct):
    content: str


class NamedTemplate(msgspec.Struct):
    name: str
    template: str


class TokenizerConfig(msgspec.Struct, kw_only=True):
    """tokenizer_config.json; only what is needed here. Every key may be missing."""

    chat_template: str | list[NamedTemplate] | None = None
    bos_token: str | AddedToken | None = None
    eos_token: str | AddedToken | None = None
    unk_token: str | AddedToken | None = None
    sep_token: str | AddedToken | None = None
    pad_token: str | AddedToken | None = None
    cls_token: str | AddedToken | None = None
    mask_token: str | AddedToken | None = None

    @classmethod
    def from_checkpoint(cls, directory: Path) -> TokenizerConfig:
        """Raises CheckpointError if it is malformed; a missing one is empty."""
        path = directory / "tokenizer_config.json"
        try:
            return read_json(path, cls)
        except FileNotFoundError:
            return cls()

    def special_tokens(self) -> dict[str, str]:
        """The named special tokens that there are: `{"eos_token": …}`."""
        found: dict[str, str] = {}
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, AddedToken):
                found[name] = value.content
            elif isinstance(value, str) and name != "chat_template":
                found[name] = value
        return found


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer, giving the same ids as transformers' AutoTokenizer.

    Which tokens it puts around a text is tokenizer.json's to say, as it is there.

    Raises:
        CheckpointError: if tokenizer.json cannot be read.
    """
    path = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers package raises no narrower type
        raise CheckpointError(f"{path}: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_chat_template(directory: Path, config: TokenizerConfig) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's (the default one of several), else None.

    Raises CheckpointError if chat_template.jinja cannot be read.
    """
    path = directory / "chat_template.jinja"
    if path.exists():
        return _read_text(path)
    if isinstance(config.chat_template, list):
        named = {template.name: template.template for template in config.chat_template}
        return named.get("default")
    return config.chat_template


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    refuse_pointer(path, content)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from None
