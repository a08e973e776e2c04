"""The tokenizer's process, over real links."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanovllm.messages import Cancel, ChatMessage, HandedOn, Refused, Submit, TokenizerToIngress
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


def test_requests_wait_for_the_scheduler(model: Path) -> None:
    text = "the quick 日本 fox"
    with started("tokenizer", model, "--max-model-len", "64") as here:
        ingress = here.ingress(inbound=list[TokenizerToIngress]).connected()
        uid = ingress.incarnation << 32
        critic = [ChatMessage("critic", "boo")]
        ingress.send(
            request(uid=uid + 1, text=text),
            request(uid=uid + 2, chat=critic),
            request(uid=uid + 3, text="cancelled"),
            Cancel(uid + 3),
        )
        # With no scheduler there, only the refusal can be told.
        (refusal,) = ingress.expect(1)
        assert isinstance(refusal, Refused)
        assert (refusal.uid, refusal.code) == (uid + 2, "invalid_request")

        scheduler = here.scheduler(inbound=list[Submit]).connected()
        (submit,) = scheduler.expect(1)
        assert submit.uid == uid + 1
        assert list(memoryview(submit.prompt).cast("i")) == tiny_tokenizer().encode(text).ids
        handed_on = HandedOn(uid + 1, 3, len(submit.prompt) // 4, scheduler.incarnation)
        assert ingress.expect(1) == [handed_on]

        # The requests of an ingress that died while they waited reach nobody.
        here.end(scheduler)
        ingress.send(request(uid=uid + 4, text=text), request(uid=uid + 5, text=""))
        ingress.expect(1)
        here.end(ingress)
        ingress = here.ingress(inbound=list[TokenizerToIngress]).connected()
        uid = ingress.incarnation << 32
        ingress.send(request(uid=uid + 1, text=text))
        scheduler = here.scheduler(inbound=list[Submit]).connected()
        (submit,) = scheduler.expect(1)
        assert submit.uid == uid + 1
        handed_on = HandedOn(uid + 1, 3, len(submit.prompt) // 4, scheduler.incarnation)
        assert ingress.expect(1) == [handed_on]


def test_a_model_without_tokenizer_gets_one_clear_line(tmp_path: Path) -> None:
    write_checkpoint_files(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with started("tokenizer", tmp_path) as here:
        assert here.process.wait(30) == 2
