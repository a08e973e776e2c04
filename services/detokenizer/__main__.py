"""The detokenizer process: `python -m nanovllm.services.detokenizer`."""

from __future__ import annotations

from functools import partial
from typing import NoReturn

from nanovllm.messages import IngressToDetokenizer, SchedulerToDetokenizer
from nanovllm.service import RETRY_S, Service, service_command
from nanovllm.services.detokenizer.core import Detokenizer
from nanovllm.transport.links import ConnectedLink, Event, Received, Up
from nanovllm.vocabulary import Vocabulary


class DetokenizerLoop:
    """Feeds the core from the engines' schedulers, and the ingress from the core."""

    def __init__(self, service: Service, core: Detokenizer) -> None:
        self._core = core
        self._service = service
        self._ingress = service.connect(
            service.settings.services_endpoint, list[IngressToDetokenizer], self._on_ingress
        )
        # By the engine's number. `_endpoints` is what the ingress has said last.
        self._schedulers: dict[int, ConnectedLink[SchedulerToDetokenizer]] = {}
        self._endpoints: dict[int, str] = {}

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
        if isinstance(event, Up):
            self._core.ingress_up()
        elif isinstance(event, Received):
            before, self._endpoints = self._endpoints, event.message.endpoints
            for engine, endpoint in self._endpoints.items():
                if engine in self._schedulers and endpoint != before.get(engine, endpoint):
                    self._disconnect(engine)
                if engine not in self._schedulers:
                    handler = partial(self._on_scheduler, engine)
                    self._schedulers[engine] = self._service.connect(
                        endpoint, list[SchedulerToDetokenizer], handler
                    )
            for engine, link in list(self._schedulers.items()):
                if link.peer is None:
                    self._disconnect_if_left(engine)

    def _on_scheduler(self, engine: int, event: Event[SchedulerToDetokenizer]) -> None:
        if isinstance(event, Received):
            self._core.take(event.message, engine)
        elif isinstance(event, Up):
            self._core.forget(engine)
        else:
            self._disconnect_if_left(engine)

    def _disconnect_if_left(self, engine: int) -> None:
        """An ingress that starts learns of the engines one after the other: a link that stands is
        kept."""
        if engine not in self._endpoints:
            self._disconnect(engine)

    def _disconnect(self, engine: int) -> None:
        self._service.disconnect(self._schedulers.pop(engine))
        self._core.forget(engine)


def serve(service: Service) -> NoReturn:
    core = Detokenizer(Vocabulary.from_checkpoint(service.directory))
    loop = DetokenizerLoop(service, core)
    service.ready()
    service.run(loop.step, core.stats)


if __name__ == "__main__":
    service_command("detokenizer", serve)()
