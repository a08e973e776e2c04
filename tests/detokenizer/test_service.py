"""The detokenizer's process, over real links."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanovllm.messages import Begin, Delta, End, Ending, Finished, Usage, pack
from tests.bpe import tiny_tokenizer, write_checkpoint_files
from tests.detokenizer.test_core import begin, rows
from tests.tokenizer.neighbours import imported_modules, started

LIFE, NEXT_LIFE = 11, 12


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
        scheduler = here.scheduler(inbound=list[End]).connected()
        ingress = here.ingress(inbound=list[Delta], incarnation=LIFE).connected()
        uid = LIFE << 32 | 5

        scheduler.send(Begin(uid, 1, b"", 0, [], 3, 0, []))
        for offset, token_id in enumerate(token_ids):
            scheduler.send(rows((uid, 1, offset, token_id)))
        scheduler.send(Finished(uid, 1, "length", len(token_ids)))
        ingress.wait(lambda: any(delta.ending for delta in ingress.received))
        assert "".join(delta.text for delta in ingress.received) == text

        # The same ingress, connected anew, is sent all of it again.
        here.end(ingress)
        ingress = here.ingress(inbound=list[Delta], incarnation=LIFE).connected()
        whole = Ending("length", Usage(3, len(token_ids), 0))
        assert ingress.expect(1) == [Delta(uid, 1, 0, 0, pack(token_ids), text, [], whole)]

        # Of what is said while it is away, nothing is lost either.
        here.end(ingress)
        scheduler.send(begin(token_ids[:2], uid=uid + 1))
        ingress = here.ingress(inbound=list[Delta], incarnation=LIFE).connected()
        assert {delta.uid for delta in ingress.expect(2)} == {uid, uid + 1}

        # A new scheduler owns other attempts.
        here.end(scheduler)
        scheduler = here.scheduler(inbound=list[End]).connected()
        scheduler.send(
            rows((uid + 1, 1, 2, token_ids[2])), begin(token_ids[:4], uid=uid + 1, attempt=2)
        )
        (delta,) = ingress.expect(1)
        assert (delta.attempt, delta.token_offset, delta.token_ids) == (2, 0, pack(token_ids[:4]))

        # A new ingress has no part in the requests of the old one.
        here.end(ingress)
        ingress = here.ingress(inbound=list[Delta], incarnation=NEXT_LIFE).connected()
        new_uid = NEXT_LIFE << 32 | 1
        scheduler.send(rows((uid + 1, 2, 4, token_ids[4])), begin(token_ids, uid=new_uid))
        (delta,) = ingress.expect(1)
        assert (delta.uid, delta.text) == (new_uid, text)
