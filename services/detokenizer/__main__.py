"""The detokenizer process: `python -m nanovllm.services.detokenizer`."""

from __future__ import annotations

from typing import NoReturn

from nanovllm.messages import SchedulerToDetokenizer
from nanovllm.service import RETRY_S, Service, service_command
from nanovllm.services.detokenizer.core import Detokenizer
from nanovllm.transport.links import Event, Received, Up
from nanovllm.vocabulary import Vocabulary


class DetokenizerLoop:
    """Feeds the core from the scheduler, and the ingress from the core."""

    def __init__(self, service: Service, core: Detokenizer) -> None:
        self._core = core
        settings = service.settings
        # The ingress sends nothing but its welcome.
        self._ingress = service.connect(settings.services_endpoint, list[None], self._on_ingress)
        service.connect(
            settings.scheduler_endpoint, list[SchedulerToDetokenizer], self._on_scheduler
        )

    def step(self, now: float) -> float | None:
        """Sends all new output. Output that cannot be sent now is sent later, merged."""
        if self._ingress.peer is None:
            return None
        while frame := self._core.frame():
            if not self._ingress.send(frame):
                return RETRY_S
            self._core.sent(frame)
        return None

    def _on_ingress(self, event: Event[None]) -> None:
        if isinstance(event, Up):
            self._core.ingress_up()

    def _on_scheduler(self, event: Event[SchedulerToDetokenizer]) -> None:
        if isinstance(event, Received):
            self._core.take(event.message)
        elif isinstance(event, Up):
            self._core.scheduler_up()


def serve(service: Service) -> NoReturn:
    core = Detokenizer(Vocabulary.from_checkpoint(service.directory))
    loop = DetokenizerLoop(service, core)
    service.ready()
    service.run(loop.step, core.stats)


if __name__ == "__main__":
    service_command("detokenizer", serve)()
