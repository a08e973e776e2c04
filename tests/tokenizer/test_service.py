"""The tokenizer's process, over real links."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanovllm.messages import Refused, Tokenized, TokenizerToIngress, unpack
from nanovllm.protocol import ChatMessage
from tests.bpe import tiny_tokenizer, write_checkpoint_files
from tests.tokenizer.neighbours import imported_modules, started
from tests.tokenizer.test_prompts import request


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint_files(tmp_path_factory.mktemp("model"))


def test_it_needs_no_torch_and_starts_without_chat_templates() -> None:
    modules = imported_modules("nanovllm.services.tokenizer.__main__")
    assert not modules & {"torch", "transformers"}
    assert "torch" not in imported_modules("transformers.utils.chat_template_utils")


def test_each_ingress_is_answered_what_it_asked(model: Path) -> None:
    text = "the quick 日本 fox"
    token_ids = tiny_tokenizer().encode(text).ids
    with started("tokenizer", model, "--max-model-len", "64") as here:
        ingress = here.ingress(inbound=list[TokenizerToIngress]).connected()
        critic = [ChatMessage("critic", "boo")]
        ingress.send(request(uid=1, prompt=text), request(uid=2, messages=critic))
        tokenized, refused = ingress.expect(2)
        assert isinstance(tokenized, Tokenized)
        assert (tokenized.uid, unpack(tokenized.prompt).tolist()) == (1, token_ids)
        assert isinstance(refused, Refused)
        assert (refused.uid, refused.code) == (2, "invalid_request")

        ingress.send(request(uid=3, prompt=text))
        here.end(ingress)
        ingress = here.ingress(inbound=list[TokenizerToIngress]).connected()
        ingress.send(request(uid=4, prompt=text))
        (tokenized,) = ingress.expect(1)
        assert tokenized.uid == 4, "nothing that another one asked"


def test_a_model_without_tokenizer_gets_one_clear_line(tmp_path: Path) -> None:
    write_checkpoint_files(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with started("tokenizer", tmp_path) as here:
        assert here.process.wait(30) == 2
