"""The detokenizer's process, over real links."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanovllm.messages import Begin, Decoded, Ending, Finished, pack
from nanovllm.protocol import Usage
from tests.bpe import tiny_tokenizer, write_checkpoint_files
from tests.detokenizer.test_core import begin, rows
from tests.tokenizer.neighbours import imported_modules, started

INCARNATION = 11
UID = INCARNATION << 32 | 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint_files(tmp_path_factory.mktemp("model"))


def test_it_needs_no_torch() -> None:
    modules = imported_modules("nanovllm.services.detokenizer.__main__")
    assert not modules & {"torch", "transformers", "tokenizers"}


def test_text_from_tokens_whoever_comes_and_goes(model: Path) -> None:
    text = "日本 is naïve 😀"
    token_ids = tiny_tokenizer().encode(text).ids
    with started("detokenizer", model) as here:
        scheduler = here.scheduler(inbound=list[None]).connected()
        ingress = here.ingress(inbound=list[Decoded], incarnation=INCARNATION).connected()

        scheduler.send(Begin(UID, 1, b"", 0, [], 3, 0, []))
        for offset, token_id in enumerate(token_ids):
            scheduler.send(rows((UID, 1, offset, token_id)))
        scheduler.send(Finished(UID, 1, "length", len(token_ids)))
        ingress.wait(lambda: any(decoded.ending for decoded in ingress.received))
        assert "".join(decoded.text for decoded in ingress.received) == text

        # The same ingress, connected anew, is sent all of it again.
        here.end(ingress)
        ingress = here.ingress(inbound=list[Decoded], incarnation=INCARNATION).connected()
        whole = Ending("length", Usage(3, len(token_ids), 0))
        assert ingress.expect(1) == [Decoded(UID, 1, 0, 0, pack(token_ids), text, [], whole)]

        # Of what is said while it is away, nothing is lost either.
        here.end(ingress)
        scheduler.send(begin(token_ids[:2], uid=UID + 1))
        ingress = here.ingress(inbound=list[Decoded], incarnation=INCARNATION).connected()
        assert {decoded.uid for decoded in ingress.expect(2)} == {UID, UID + 1}

        # Of what an earlier scheduler had begun, nothing is left.
        here.end(scheduler)
        scheduler = here.scheduler(inbound=list[None]).connected()
        scheduler.send(rows((UID + 1, 1, 2, token_ids[2])), begin(token_ids, uid=UID + 2))
        (decoded,) = ingress.expect(1)
        assert (decoded.uid, decoded.text) == (UID + 2, text)
