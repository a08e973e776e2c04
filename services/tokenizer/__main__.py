"""The tokenizer process: `python -m nanovllm.services.tokenizer`."""

from __future__ import annotations

import time
from typing import NoReturn

from nanovllm.grammars import Grammars
from nanovllm.messages import IngressToTokenizer
from nanovllm.service import RETRY_S, Service, service_command
from nanovllm.services.tokenizer.core import TokenizeQueue
from nanovllm.services.tokenizer.grammar_checks import GrammarChecks
from nanovllm.services.tokenizer.prompts import PromptEncoder
from nanovllm.transport.links import Event, Received

# Tokenizing goes on for this long before the links are looked at again.
WORK_S = 0.005


class TokenizerLoop:
    """Feeds the queue from the ingress, and the ingress from the queue."""

    def __init__(self, service: Service, queue: TokenizeQueue, checks: GrammarChecks) -> None:
        self._queue = queue
        self._checks = checks
        service.watch(checks.descriptor, self._take_checked)
        self._ingress = service.connect(
            service.settings.services_endpoint, list[IngressToTokenizer], self._on_ingress
        )

    def step(self, now: float) -> float | None:
        again_s = None
        while not self._queue.idle:
            if not self._queue.work():
                again_s = RETRY_S
                break
            if time.monotonic() - now > WORK_S:
                again_s = 0.0
                break
        while self._ingress.peer is not None and (frame := self._queue.frame()):
            if not self._ingress.send(frame):
                return RETRY_S
            self._queue.sent(frame)
        return again_s

    def _take_checked(self) -> None:
        for answer in self._checks.take():
            self._queue.checked(answer)

    def _on_ingress(self, event: Event[IngressToTokenizer]) -> None:
        if isinstance(event, Received):
            self._queue.add(event.message)
        else:
            self._queue.forget()


def serve(service: Service) -> NoReturn:
    encoder = PromptEncoder.from_checkpoint(
        service.directory, service.config, service.settings.max_model_len
    )
    # To read a large vocabulary takes a second, in which no other thread would answer.
    grammars = Grammars.from_checkpoint(service.directory, service.config)
    checks = GrammarChecks(lambda: grammars)
    queue = TokenizeQueue(encoder.encode, checks.start, encoder.prepared)
    loop = TokenizerLoop(service, queue, checks)
    service.ready()
    if service.settings.http:
        encoder.prepare_for_chats()  # others may never send a chat
    service.run(loop.step, queue.stats)


if __name__ == "__main__":
    service_command("tokenizer", serve)()
