"""The detokenizer's process, over real links."""

from __future__ import annotations

from nanovllm.messages import Begin, Decoded, Engines, Finished, TextOptions
from nanovllm.transport.links import Down
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

        # While the ingress is away its engines have no link, so that they give its outputs to
        # another detokenizer. When it is back they begin all anew.
        ingress.leave()
        scheduler.expect(Down)
        ingress.come_back(reborn=False)
        ingress.send(Engines({0: endpoints[0]}))
        scheduler.send(rows((UID, 1, 0, token_ids[0])), begin(token_ids, uid=UID + 1))
        decoded = ingress.expect(Decoded)
        assert (decoded.uid, decoded.text) == (UID + 1, text)

        # Of what an earlier scheduler had begun, nothing is left.
        scheduler.come_back(reborn=True)
        scheduler.send(rows((UID + 1, 1, 2, token_ids[2])), begin(token_ids, uid=UID + 2))
        decoded = ingress.expect(Decoded)
        assert (decoded.uid, decoded.text) == (UID + 2, text)

        # An engine that comes is connected to beside the other, and given up when it leaves.
        other = here.binds("scheduler", endpoints[1], list[None])
        ingress.send(Engines(dict(enumerate(endpoints))))
        other.send(begin(token_ids, uid=UID + 3))
        assert ingress.expect(Decoded).uid == UID + 3
        ingress.send(Engines({0: endpoints[0]}))
        other.expect(Down)
        scheduler.send(begin(token_ids, uid=UID + 4))
        assert ingress.expect(Decoded).uid == UID + 4
