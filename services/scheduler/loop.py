"""The loop around the core: hands received messages to the core, and sends the core's messages."""

from __future__ import annotations

import logging
from typing import NoReturn

from nanovllm.messages import (
    GroupReady,
    IngressToScheduler,
    Prepared,
    StepResult,
    WorkerToScheduler,
)
from nanovllm.service import RETRY_S, Service
from nanovllm.services.scheduler.core import Scheduler
from nanovllm.transport.links import Down, Event, Peer, Received, Up
from nanovllm.wording import counted

log = logging.getLogger(__name__)

# How often at most the log tells of outputs that ended with an error.
TELL_FAILURES_S = 60.0


class SchedulerLoop:
    """Feeds the core from its peers, and its peers from the core."""

    def __init__(self, service: Service, core: Scheduler) -> None:
        self._core = core
        self._retry_at = 0.0
        self._failures_told = 0
        self._tell_failures_at = 0.0
        settings = service.settings
        self._link = service.bind(
            settings.scheduler_endpoint(service.me.engine), list[WorkerToScheduler], self._on_event
        )
        if settings.scheduler_beyond:
            core.endpoint = service.bind_beyond(self._link, settings.scheduler_beyond)
        self._ingress = service.connect(
            settings.services_endpoint, list[IngressToScheduler], self._on_ingress
        )

    def step(self, now: float) -> float | None:
        """Makes plans, and sends all that is new."""
        if self._core.failed > self._failures_told and now >= self._tell_failures_at:
            log.error(
                "%s ended with an error: the model's logits are not finite (NaN or inf); are the"
                " weights sound?",
                counted(self._core.failed - self._failures_told, "output"),
            )
            self._failures_told = self._core.failed
            self._tell_failures_at = now + TELL_FAILURES_S
        all_sent = self._launch()
        if self._ingress.peer is not None and (messages := self._core.for_ingress()):
            if self._ingress.send(messages):
                self._core.ingress_told()
            else:
                all_sent = False
        detokenizers = self._core.detokenizers
        if now >= self._retry_at:
            detokenizers.retry()
        while frames := detokenizers.frames():
            for frame in frames:
                if self._link.send(frame.peer, frame.messages):
                    detokenizers.delivered(frame)
                else:
                    detokenizers.undelivered(frame)
                    self._retry_at = now + RETRY_S
        return RETRY_S if not all_sent or now < self._retry_at else None

    def _launch(self) -> bool:
        """Makes as many plans as may be in flight. Returns False if one could not be sent."""
        taken = self._send_to_worker()
        while self._core.plan():
            taken = self._send_to_worker()
            self._core.settle()
        self._core.settle()
        return taken

    def _send_to_worker(self) -> bool:
        group = self._core.group
        messages = group.unsent
        if not messages or group.peer is None:
            return True
        if not self._link.send(group.peer, messages):
            return False
        group.sent()
        return True

    def _on_event(self, event: Event[WorkerToScheduler]) -> None:
        core = self._core
        match event:
            case Received(peer=peer, message=StepResult() as result):
                core.result(peer, result)
                self._launch()
            case Received(peer=peer, message=Prepared() as message):
                core.prepared(peer, message)
            case Received(peer=peer, message=GroupReady() as message):
                core.group_ready(peer, message)
            case Up(peer=Peer(role="gpu_worker") as peer):
                core.worker_up(peer)
            case Down(peer=Peer(role="gpu_worker") as peer):
                core.worker_down(peer)
            case Up(peer=peer):
                core.detokenizer_up(peer)
            case Down(peer=peer):
                core.detokenizer_down(peer)

    def _on_ingress(self, event: Event[IngressToScheduler]) -> None:
        match event:
            case Received(message=message):
                self._core.from_ingress(message)
            case Up():
                self._core.ingress_up()


def serve(service: Service) -> NoReturn:
    core = Scheduler(service.settings, service.me.engine, service.me.incarnation << 32)
    loop = SchedulerLoop(service, core)
    service.ready()
    try:
        service.run(loop.step, core.stats)
    finally:
        service.close()
