"""The detokenizer's process, over real links."""

from __future__ import annotations

from nanovllm.messages import Begin, Decoded, Ending, Engines, Finished, TextOptions, pack
from nanovllm.protocol import Usage
from tests.bpe import tiny_tokenizer
from tests.detokenizer.test_core import begin, rows
from tests.peer import Neighbourhood, imported_modules

INCARNATION = 11
UID = INCARNATION << 32 | 5


def test_it_needs_no_torch() -> None:
    modules = imported_modules("nanovllm.services.detokenizer.__main__")
    assert not modules & {"torch", "transformers", "tokenizers"}


def test_text_from_tokens_whoever_comes_and_goes() -> None:
    text = "日本 is naïve 😀"
    token_ids = tiny_tokenizer().encode(text).ids
    with Neighbourhood() as here:
        here.start("detokenizer")
        endpoints = [here.settings.scheduler_endpoint(engine) for engine in range(2)]
        scheduler = here.binds("scheduler", endpoints[0], list[None])
        ingress = here.binds("ingress", here.settings.services_endpoint, list[Decoded], INCARNATION)
        ingress.send(Engines({0: endpoints[0]}))
        scheduler.send(Begin(UID, 1, b"", 0, TextOptions(), 3, 0, []))
        for offset, token_id in enumerate(token_ids):
            scheduler.send(rows((UID, 1, offset, token_id)))
        scheduler.send(Finished(UID, 1, "length", len(token_ids)))
        here.wait("end", lambda: any(d.ending for d in ingress.all(Decoded)) or None)
        assert "".join(decoded.text for decoded in ingress.all(Decoded)) == text

        # The same ingress, connected anew, is sent all of it again.
        ingress.come_back(reborn=False)
        whole = Ending("length", Usage(3, len(token_ids), 0))
        assert ingress.expect(Decoded) == Decoded(UID, 1, 0, 0, pack(token_ids), text, [], whole)

        # Of what is said while it is away, nothing is lost either.
        ingress.leave()
        scheduler.send(begin(token_ids[:2], uid=UID + 1))
        ingress.come_back(reborn=False)
        assert {ingress.expect(Decoded).uid for _ in range(2)} == {UID, UID + 1}

        # Of what an earlier scheduler had begun, nothing is left.
        scheduler.come_back(reborn=True)
        scheduler.send(rows((UID + 1, 1, 2, token_ids[2])), begin(token_ids, uid=UID + 2))
        decoded = ingress.expect(Decoded)
        assert (decoded.uid, decoded.text) == (UID + 2, text)

        # An engine that comes is connected to beside the other. Of one that has left for good
        # nothing is left.
        other = here.binds("scheduler", endpoints[1], list[None])
        ingress.send(Engines(dict(enumerate(endpoints))))
        other.send(begin(token_ids, uid=UID + 3))
        assert ingress.expect(Decoded).uid == UID + 3
        other.leave()

        def sent_to_another_ingress() -> set[int]:
            ingress.come_back(reborn=True)
            ingress.send(Engines({0: endpoints[0]}))
            return {ingress.expect(Decoded).uid, *(d.uid for d in ingress.all(Decoded))}

        here.wait("end of its output", lambda: sent_to_another_ingress() == {UID + 2} or None)
