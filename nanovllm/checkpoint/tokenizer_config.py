"""tokenizer_config.json: the chat template, and tokens that tokenizer.json may lack."""

from __future__ import annotations

from pathlib import Path

import msgspec

from nanovllm.checkpoint.files import read_json


class AddedToken(msgspec.Struct):
    """A token beside the model's own. `normalized`: None means that special tokens are not."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False


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
    added_tokens_decoder: dict[int, AddedToken] = {}
    additional_special_tokens: list[str | AddedToken] | None = None
    extra_special_tokens: list[str | AddedToken] | dict[str, str | AddedToken] | None = None

    @classmethod
    def from_checkpoint(cls, directory: Path) -> TokenizerConfig:
        """Raises CheckpointError if it is malformed; a missing one is empty."""
        try:
            return read_json(directory / "tokenizer_config.json", cls)
        except FileNotFoundError:
            return cls()

    def special_tokens(self) -> dict[str, str]:
        """The named special tokens that there are: `{"eos_token": …}`."""
        return {name: token.content for name, token in self._named().items()}

    def added_tokens(self, known: set[str]) -> list[AddedToken]:
        """The tokens that transformers adds to those of tokenizer.json, in transformers' order,
        whatever ids `added_tokens_decoder` gives them. A token that is there keeps its id.

        Args:
            known: the contents of tokenizer.json's own added tokens.
        """
        tokens = [token for _, token in sorted(self.added_tokens_decoder.items())]
        known = known | {token.content for token in tokens}
        extra = self.extra_special_tokens or []
        further = [
            *(self.additional_special_tokens or []),
            *(extra.values() if isinstance(extra, dict) else extra),
        ]
        for token in [*self._named().values(), *map(_special, further)]:
            if token.content not in known:
                known.add(token.content)
                tokens.append(token)
        return [token for token in tokens if token.content]

    def _named(self) -> dict[str, AddedToken]:
        values = {name: getattr(self, name) for name in self.__struct_fields__ if name in NAMED}
        return {name: _special(value) for name, value in values.items() if value is not None}


NAMED = {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}


def _special(token: str | AddedToken) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    return msgspec.structs.replace(token, special=True)
