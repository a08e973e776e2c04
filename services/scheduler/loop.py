"""The loop around the core: polls, hands messages to it, sends what it has to say."""

from __future__ import annotations

import logging
from typing import NoReturn

from nanovllm.messages import (
    End,
    GroupReady,
    IngressToScheduler,
    Recall,
    StepResult,
    Submit,
    TokenizerToScheduler,
    WorkerToScheduler,
)
from nanovllm.service import Service
from nanovllm.services.scheduler.core import Scheduler
from nanovllm.transport.links import Down, Event, Peer, Received, Up

log = logging.getLogger(__name__)

Inbound = IngressToScheduler | TokenizerToScheduler | WorkerToScheduler

# How soon to try again when a peer does not keep up.
RETRY_S = 0.01


class SchedulerLoop:
    """Feeds the core from its peers, and its peers from the core."""

    def __init__(self, service: Service, core: Scheduler) -> None:
        self._core = core
        self._ingress: Peer | None = None
        self._retry_at = 0.0
        self._link = service.bind(
            service.settings.scheduler_endpoint, list[Inbound], self._on_event
        )

    def step(self, now: float) -> float | None:
        """Plans for what has arrived, and tells everyone what is new."""
        all_sent = self._launch()
        if self._ingress is not None and (messages := self._core.for_ingress()):
            if self._link.send(self._ingress, messages):
                self._core.ingress_told()
            else:
                all_sent = False
        if self._core.blocked and now >= self._retry_at:
            self._core.retry()
        while parcels := self._core.parcels():
            for parcel in parcels:
                if self._link.send(parcel.peer, parcel.messages):
                    self._core.delivered(parcel)
                else:
                    self._core.undelivered(parcel)
                    self._retry_at = now + RETRY_S
        return RETRY_S if not all_sent or self._core.blocked else None

    def _launch(self) -> bool:
        """Fills the pipeline; False if the worker does not take what there is for it."""
        taken = self._send_to_worker()
        while self._core.plan():
            taken = self._send_to_worker()
            self._core.settle()
        self._core.settle()
        return taken

    def _send_to_worker(self) -> bool:
        messages = self._core.for_worker()
        if not messages or self._core.worker is None:
            return True
        if not self._link.send(self._core.worker, messages):
            return False
        self._core.worker_told()
        return True

    def _on_event(self, event: Event[Inbound]) -> None:
        match event:
            case Received(peer=Peer(role="gpu_worker") as peer, message=StepResult() as result):
                self._core.result(peer, result)
                self._launch()
            case Received(peer=Peer(role="gpu_worker") as peer, message=GroupReady() as message):
                self._core.group_ready(peer, message)
            case Received(peer=Peer(role="tokenizer"), message=Submit() as submit):
                self._core.submit(submit)
            case Received(peer=Peer(role="ingress"), message=End(uid=uid)):
                self._core.end(uid)
            case Received(peer=Peer(role="ingress"), message=Recall(uid=uid, attempt=attempt)):
                self._core.recall(uid, attempt)
            case Up(peer=Peer(role="ingress") as peer):
                self._ingress = peer
                self._core.ingress_up(peer.incarnation)
            case Up(peer=Peer(role="detokenizer") as peer):
                self._core.detokenizer_up(peer)
            case Up(peer=Peer(role="gpu_worker") as peer):
                self._core.worker_up(peer)
            case Down(peer=peer):
                self._on_down(peer)
            case Received(peer=peer, message=message):
                log.error("dropped a %s from %s", type(message).__name__, peer)

    def _on_down(self, peer: Peer) -> None:
        if peer == self._ingress:
            self._ingress = None
        elif peer.role == "detokenizer":
            self._core.detokenizer_down(peer)
        elif peer.role == "gpu_worker":
            self._core.worker_down(peer)


def serve(service: Service) -> NoReturn:
    core = Scheduler(service.settings)
    loop = SchedulerLoop(service, core)
    service.ready()
    try:
        service.run(loop.step, core.stats)
    finally:
        service.close()
