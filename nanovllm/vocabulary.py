"""What the tokens of a byte-level BPE vocabulary stand for.

In such a vocabulary each token is a run of bytes, and the decoding of a token list is those bytes,
joined and read as UTF-8, with U+FFFD for what is none. Nothing else of the file is needed to
decode, and reading it so takes a tenth of the time that building the tokenizer does.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from nanovllm.checkpoint.config import ModelConfig
from nanovllm.checkpoint.files import CheckpointError, read_json
from nanovllm.checkpoint.generation import check_eos
from nanovllm.checkpoint.tokenizer_config import TokenizerConfig


class Vocabulary(msgspec.Struct, frozen=True):
    """The tokens of one tokenizer.

    Attributes:
        text: of each token id the bytes that it adds to the decoded text; none of special tokens,
            which add nothing, as does an id that the vocabulary does not have.
        special: of each special token id the bytes of its name.
        longest_entry: the bytes of the longest token, special ones included.
        size: one more than the highest token id, special tokens included.
        added: the ids of the tokens beside the model's own, by their content; special ones too.
    """

    text: dict[int, bytes]
    longest_entry: int
    size: int
    special: dict[int, bytes] = {}
    added: dict[str, int] = {}

    @property
    def whole_text(self) -> Mapping[int, bytes]:
        """`text` and `special` together."""
        return ChainMap(self.special, self.text)

    def id_of(self, token: str) -> int | None:
        """The id of the token with this name in tokenizer.json, if there is one."""
        if token in self.added:
            return self.added[token]
        raw = token_bytes(token)
        return next((i for i, text in self.text.items() if text == raw), None)

    @classmethod
    def from_checkpoint(cls, directory: Path) -> Vocabulary:
        """Reads tokenizer.json, and tokenizer_config.json for further tokens.

        Raises:
            CheckpointError: if it is missing, malformed, or not byte-level.
        """
        path = directory / "tokenizer.json"
        try:
            file = read_json(path, _TokenizerFile, "not a byte-level BPE tokenizer: ")
        except FileNotFoundError:
            raise CheckpointError(f"{directory} has no tokenizer.json") from None
        if not file.decoder.is_byte_level:
            raise CheckpointError(
                f"{path}: the decoder is {file.decoder.type!r}; only byte-level BPE is served"
            )
        _add_tokens(file, TokenizerConfig.from_checkpoint(directory))
        # An added token takes the place of the model's with the same id.
        tokens = {token_id: token for token, token_id in file.model.vocab.items()}
        tokens.update((added.id, added.content) for added in file.added_tokens)
        text = {token_id: token_bytes(token) for token_id, token in tokens.items()}
        longest = max(map(len, text.values()), default=0)
        names = {added.content for added in file.added_tokens if added.special}
        special = {i: text.pop(i) for i, token in tokens.items() if token in names}
        return cls(
            text=text,
            longest_entry=longest,
            size=max(tokens, default=-1) + 1,
            special=special,
            added={added.content: added.id for added in file.added_tokens},
        )


def end_of_sequence(directory: Path, model: ModelConfig, vocabulary: Vocabulary) -> tuple[int, ...]:
    """The end-of-sequence ids: those of the model's files, else the tokenizer's, if it has one.

    Raises CheckpointError if the model does not have the tokenizer's.
    """
    if model.eos_token_ids is not None:
        return model.eos_token_ids
    name = TokenizerConfig.from_checkpoint(directory).special_tokens().get("eos_token", "")
    own = vocabulary.id_of(name) if name else None
    if own is None:
        return ()
    source = f"{directory / 'tokenizer_config.json'}: eos_token {name!r}, id"
    check_eos(source, own, model.vocab_size)
    return (own,)


def token_bytes(token: str) -> bytes:
    """The bytes that a token's name in tokenizer.json stands for.

    Each character stands for a byte, by GPT-2's table; a token with any other character (an added
    one) stands for itself.
    """
    try:
        return token.translate(_BYTE_OF).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


class _ByteTable(dict[int, int]):
    """GPT-2's table from characters to bytes: printable Latin-1 characters stand for themselves,
    and the characters from U+0100 on for the other bytes, in order."""

    OTHER: Final = 0xFFFF

    def __init__(self) -> None:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        super().__init__((byte, byte) for byte in printable)
        rest = [byte for byte in range(256) if byte not in self]
        self.update((0x100 + place, byte) for place, byte in enumerate(rest))

    def __missing__(self, character: int) -> int:
        return self.OTHER


_BYTE_OF: Final = _ByteTable()


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Decoder(msgspec.Struct):
    type: str
    decoders: list[_Decoder] = []

    @property
    def is_byte_level(self) -> bool:
        return self.type == "ByteLevel" or (
            len(self.decoders) == 1 and self.decoders[0].is_byte_level
        )


class _Model(msgspec.Struct):
    vocab: dict[str, int]


class _TokenizerFile(msgspec.Struct):
    """tokenizer.json; only what is needed here."""

    model: _Model
    decoder: _Decoder
    added_tokens: list[_AddedToken] = []


def _add_tokens(file: _TokenizerFile, config: TokenizerConfig) -> None:
    """Adds the tokens that tokenizer_config.json adds, with the ids that transformers gives."""
    ids = {**file.model.vocab, **{added.content: added.id for added in file.added_tokens}}
    end = max([len(file.model.vocab), *(added.id + 1 for added in file.added_tokens)])
    for token in config.added_tokens({added.content for added in file.added_tokens}):
        token_id = ids.setdefault(token.content, end)
        end = max(end, token_id + 1)
        file.added_tokens.append(_AddedToken(token_id, token.content, token.special))
