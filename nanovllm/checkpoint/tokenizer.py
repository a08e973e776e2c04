"""The checkpoint's tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from nanovllm.checkpoint.files import CheckpointError, refuse_pointer
from nanovllm.checkpoint.tokenizer_config import TokenizerConfig


def load_tokenizer(directory: Path, config: TokenizerConfig) -> Tokenizer:
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
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens(
        [
            AddedToken(
                added.content,
                single_word=added.single_word,
                lstrip=added.lstrip,
                rstrip=added.rstrip,
                normalized=not added.special if added.normalized is None else added.normalized,
                special=added.special,
            )
            for added in config.added_tokens(known)
        ]
    )
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
