"""Token bytes against the tokenizers package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanovllm.checkpoint import CheckpointError
from nanovllm.vocabulary import Vocabulary
from tests.bpe import ADDED, SPECIAL, tiny_tokenizer, write_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("vocabulary"))


def test_each_token_decodes_as_the_tokenizer_does(directory: Path) -> None:
    vocabulary = Vocabulary.from_checkpoint(directory)
    tokenizer = tiny_tokenizer()
    for token_id in range(tokenizer.get_vocab_size() + 50):
        expected = tokenizer.decode([token_id], skip_special_tokens=True)
        assert vocabulary.text.get(token_id, b"").decode(errors="replace") == expected


def test_longest_entry_counts_special_tokens(directory: Path) -> None:
    entries = [*SPECIAL, *ADDED]
    longest = max(len(entry.encode()) for entry in entries)
    assert Vocabulary.from_checkpoint(directory).longest_entry == longest == 13


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        Vocabulary.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"decoder": {"type": "Metaspace"}}, {"decoder": None}, {"model": {"vocab": [["a", 0.5]]}}],
)
def test_other_kinds_of_tokenizer_are_refused(
    directory: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    content = json.loads((directory / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(CheckpointError, match="byte-level BPE"):
        Vocabulary.from_checkpoint(tmp_path)


def test_broken_json_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not valid JSON"):
        Vocabulary.from_checkpoint(tmp_path)
