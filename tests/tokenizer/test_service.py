"""The tokenizer's process, over real links."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nanovllm.control import Report, TokenizerStats, ToSupervisor
from nanovllm.exit_codes import EXIT_MISCONFIGURED
from nanovllm.grammars import Grammars
from nanovllm.messages import (
    IngressToTokenizer,
    Refused,
    Tokenized,
    TokenizerToIngress,
    unpack,
)
from nanovllm.protocol import Sampling, StructuredOutputs
from nanovllm.service import REASON_PREFIX, Service
from nanovllm.services.tokenizer.__main__ import TokenizerLoop
from nanovllm.services.tokenizer.core import TokenizeQueue
from nanovllm.services.tokenizer.grammar_checks import GrammarChecks
from nanovllm.transport.links import Down, Event, Peer, Received, Up
from tests.bpe import tiny_tokenizer
from tests.peer import Neighbourhood, imported_modules
from tests.tokenizer.test_core import no_grammars
from tests.tokenizer.test_prompts import request


def test_it_needs_no_torch_and_starts_without_chat_templates() -> None:
    modules = imported_modules("nanovllm.services.tokenizer.__main__")
    assert not modules & {"torch", "transformers"}
    assert "torch" not in imported_modules("transformers.utils.chat_template_utils")


def test_each_ingress_is_answered_what_it_asked() -> None:
    text = "the quick 日本 fox"
    token_ids = tiny_tokenizer().encode(text).ids
    with Neighbourhood(max_model_len=64) as here:
        here.start("tokenizer")
        ingress = here.binds("ingress", here.settings.services_endpoint, list[TokenizerToIngress])
        critic = [{"role": "critic", "content": "boo"}]
        ingress.send(request(uid=1, prompt=text), request(uid=2, messages=critic))
        tokenized, refused = ingress.expect(Tokenized), ingress.expect(Refused)
        assert (tokenized.uid, unpack(tokenized.prompt).tolist()) == (1, token_ids)
        assert (refused.uid, refused.code) == (2, "invalid_request")

        for uid, regex in ((5, "a+"), (6, "(?=a)b")):
            outputs = StructuredOutputs(regex=regex)
            sampling = Sampling(structured_outputs=outputs)
            ingress.send(request(uid=uid, prompt=text, sampling=sampling))
        assert ingress.expect(Tokenized).uid == 5
        refused = ingress.expect(Refused)
        assert refused.uid == 6
        assert "look-around" in refused.message

        ingress.send(request(uid=3, prompt=text))
        ingress.come_back(reborn=True)
        ingress.send(request(uid=4, prompt=text))
        assert ingress.expect(Tokenized).uid == 4, "nothing that another one asked"


# Python imports it first where its directory is on the PYTHONPATH.
LATE_IMPORT = """
import pathlib, sys, time

class Late:
    def find_spec(self, name, path=None, target=None):
        if name == "transformers":
            pathlib.Path({begun!r}).touch()
            while not pathlib.Path({go_on!r}).exists():
                time.sleep(0.01)

sys.meta_path.insert(0, Late())
"""


def test_it_imports_what_renders_chats_before_any_comes_and_gives_signs_of_life_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = tmp_path / "begun", tmp_path / "go on"
    late_import = LATE_IMPORT.format(begun=str(begun), go_on=str(go_on))
    (tmp_path / "sitecustomize.py").write_text(late_import)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with Neighbourhood(max_model_len=64) as here:
        (Path(here.settings.model) / "chat_template.jinja").write_text("{{ messages }}")
        supervisor = here.binds("supervisor", here.settings.control_endpoint, list[ToSupervisor])
        ingress = here.binds("ingress", here.settings.services_endpoint, list[TokenizerToIngress])
        here.start("tokenizer")
        here.wait("import", lambda: begun.exists() or None)
        chat = [{"role": "user", "content": "the fox"}]
        ingress.send(request(uid=1, messages=chat), request(uid=2, prompt="the fox"))

        def waits(report: Report) -> bool:
            assert isinstance(report.stats, TokenizerStats)
            return report.stats.queued == 2

        for _ in range(2):
            supervisor.expect(Report, waits)
        go_on.touch()
        assert [ingress.expect(Tokenized).uid for _ in range(2)] == [1, 2]


def test_requests_sent_before_a_reconnect_are_not_tokenized() -> None:
    """Another tokenizer has the request by then, and would be blamed if this one died of it."""
    events: list[Callable[[Event[IngressToTokenizer]], None]] = []

    class Stub:
        settings = SimpleNamespace(services_endpoint="")

        def connect(self, _endpoint: str, _inbound: object, handler: Any) -> SimpleNamespace:
            events.append(handler)
            return SimpleNamespace(peer=None)

        def watch(self, _readable: int, _handler: Callable[[], None]) -> None:
            """Nothing is checked here."""

    def no_vocabulary() -> Grammars:
        raise AssertionError("no request has a grammar")

    queue = TokenizeQueue(lambda asked: Refused(asked.uid, "internal", ""), no_grammars)
    loop = TokenizerLoop(cast(Service, Stub()), queue, GrammarChecks(no_vocabulary))
    ingress = Peer("ingress", 0, 1)
    (on_event,) = events
    on_event(Up(ingress))
    on_event(Received(ingress, request(uid=1)))
    on_event(Down(ingress))
    loop.step(0.0)
    assert queue.stats().tokenized == 0


def test_a_model_without_tokenizer_gets_one_clear_line() -> None:
    with Neighbourhood() as here:
        (Path(here.settings.model) / "tokenizer.json").unlink()
        code, output = here.ended(here.start("tokenizer"))
    assert code == EXIT_MISCONFIGURED
    assert f" CRITICAL tokenizer 0 | {REASON_PREFIX}" in output
    assert output.count("\n") == 1
