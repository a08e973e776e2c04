"""The tokenizer process: `python -m nanovllm.services.tokenizer`."""

from __future__ import annotations

import time
from typing import NoReturn

from nanovllm.messages import IngressToTokenizer
from nanovllm.service import Service, service_command
from nanovllm.services.tokenizer.core import Desk
from nanovllm.services.tokenizer.prompts import PromptEncoder
from nanovllm.transport.links import Event, Received, Up

# Encoding goes on for this long before the links are looked at again.
WORK_S = 0.005
# How soon to try again when a peer does not keep up.
RETRY_S = 0.01


class TokenizerLoop:
    """Feeds the core from the ingress, and the scheduler and the ingress from the core."""

    def __init__(self, service: Service, desk: Desk) -> None:
        self._desk = desk
        settings = service.settings
        self._ingress = service.connect(
            settings.services_endpoint, list[IngressToTokenizer], self._on_ingress
        )
        # The scheduler sends nothing but its welcome.
        self._scheduler = service.connect(
            settings.scheduler_endpoint, list[None], self._on_scheduler
        )

    def step(self, now: float) -> float | None:
        while not self._desk.idle:
            self._desk.work()
            if time.monotonic() - now > WORK_S:
                break
        all_sent = self._send()
        if not self._desk.idle:
            return 0.0
        return None if all_sent else RETRY_S

    def _send(self) -> bool:
        """False if a peer that is there does not take what there is for it."""
        taken = True
        scheduler = self._scheduler.peer
        while scheduler is not None and (submits := self._desk.submits()):
            if not self._scheduler.send(submits):
                taken = False
                break
            self._desk.submitted(submits, scheduler.incarnation)
        if replies := self._desk.replies():
            if self._ingress.send(replies):
                self._desk.replied()
            else:
                taken = taken and self._ingress.peer is None
        return taken

    def _on_ingress(self, event: Event[IngressToTokenizer]) -> None:
        if isinstance(event, Received):
            self._desk.take(event.message)
        elif isinstance(event, Up):
            self._desk.ingress_up(event.peer.incarnation)

    def _on_scheduler(self, event: Event[None]) -> None:
        """Nothing to do: `step` sends what is in hand as soon as the scheduler is there."""


def serve(service: Service) -> NoReturn:
    encoder = PromptEncoder.from_checkpoint(service.directory, service.settings.max_model_len)
    desk = Desk(encoder.encode)
    loop = TokenizerLoop(service, desk)
    service.ready()
    service.run(loop.step, desk.stats)


if __name__ == "__main__":
    service_command("tokenizer", serve)()
