"""The detokenizer process: `python -m nanovllm.services.detokenizer`."""

from __future__ import annotations

from functools import partial
from typing import NoReturn

from nanovllm.messages import IngressToDetokenizer, SchedulerToDetokenizer
from nanovllm.service import RETRY_S, Service, service_command
from nanovllm.services.detokenizer.core import Detokenizer
from nanovllm.transport.links import ConnectedLink, Event, Received
from nanovllm.vocabulary import Vocabulary


class DetokenizerLoop:
    """Feeds the core from the engines' schedulers, and the ingress from the core."""

    def __init__(self, service: Service, core: Detokenizer) -> None:
        self._core = core
        self._service = service
        self._ingress = service.connect(
            service.settings.services_endpoint, list[IngressToDetokenizer], self._on_ingress
        )
        # By the engine's number: where its scheduler binds, and the link to it.
        self._schedulers: dict[int, tuple[str, ConnectedLink[SchedulerToDetokenizer]]] = {}

    def step(self, now: float) -> float | None:
        """Sends all new output. Output that cannot be sent now is sent later, merged."""
        if self._ingress.peer is None:
            return None
        while frame := self._core.frame():
            if not self._ingress.send(frame):
                return RETRY_S
            self._core.sent(frame)
        return None

    def _on_ingress(self, event: Event[IngressToDetokenizer]) -> None:
        """Connects to the engines that the ingress tells of, and to no others. A detokenizer that
        the ingress cannot reach is of no use to an engine: it leaves them all, and so their
        schedulers give its outputs to another, or begin them anew when it is back."""
        told = event.message.endpoints if isinstance(event, Received) else {}
        for engine, (endpoint, link) in list(self._schedulers.items()):
            if told.get(engine) != endpoint:
                del self._schedulers[engine]
                self._service.disconnect(link)
                self._core.forget(engine)
        for engine, endpoint in told.items():
            if engine not in self._schedulers:
                handler = partial(self._on_scheduler, engine)
                link = self._service.connect(endpoint, list[SchedulerToDetokenizer], handler)
                self._schedulers[engine] = endpoint, link

    def _on_scheduler(self, engine: int, event: Event[SchedulerToDetokenizer]) -> None:
        if isinstance(event, Received):
            self._core.take(event.message, engine)
        else:
            self._core.forget(engine)


def serve(service: Service) -> NoReturn:
    core = Detokenizer(Vocabulary.from_checkpoint(service.directory))
    loop = DetokenizerLoop(service, core)
    service.ready()
    service.run(loop.step, core.stats)


if __name__ == "__main__":
    service_command("detokenizer", serve)()
