"""The ingress's sockets around its core."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import NoReturn, Protocol, TypeVar

from nanovllm import __version__
from nanovllm.checkpoint import model_name
from nanovllm.control import Crashed, Drain, Forget, FromSupervisor, Vacate
from nanovllm.messages import (
    Decoded,
    DetokenizerToIngress,
    EngineState,
    Lost,
    Message,
    Missing,
    SchedulerToIngress,
    TokenizerToIngress,
)
from nanovllm.service import RETRY_S, Service
from nanovllm.services.ingress.clients import ClientSocket, Sent
from nanovllm.services.ingress.core import About, Core
from nanovllm.services.ingress.frames import Limits
from nanovllm.services.ingress.sessions import Session
from nanovllm.tracing import tracer_to
from nanovllm.transport.links import HEARTBEAT_S, Down, Event, Peer, Received, Up

T = TypeVar("T", bound=Message)

FromServices = TokenizerToIngress | SchedulerToIngress | DetokenizerToIngress

# Drawn seeds are told to clients, some of whose languages have no integers but doubles.
SEED_BITS = 53
# How soon a key that was taken back ends the connections that it has opened. The loop wakes up as
# often.
LOOK_AT_KEYS_S = HEARTBEAT_S


class Outbox(Protocol[T]):
    """What is to be sent to the services of one kind."""

    def frames(self) -> Iterable[tuple[Peer, list[T]]]: ...

    def sent(self, peer: Peer, frame: list[T]) -> None: ...


class Ingress:
    """One ingress process."""

    def __init__(self, service: Service) -> None:
        settings = service.settings
        self._service = service
        self._core = Core(
            incarnation=service.me.incarnation,
            limits=Limits(
                service.config.vocab_size, settings.max_model_len, settings.max_message_bytes
            ),
            max_pending_requests=settings.max_pending_requests,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            about=About(__version__, model_name(service.directory)),
            draw_seed=lambda: secrets.randbits(SEED_BITS),
            clock=time.monotonic_ns,
            tracer=tracer_to(settings.otlp),
        )
        self._services = service.bind(
            settings.services_endpoint, list[FromServices], self._from_services
        )
        if settings.services_beyond:
            service.bind_beyond(self._services, settings.services_beyond)
        endpoints = settings.client_endpoints
        service.open_gate(*endpoints)
        self._clients = ClientSocket(
            service.context, endpoints, settings.max_message_bytes, service.keys
        )
        self._drain_at: float | None = None
        self._look_at_keys_at = 0.0
        service.on_told(self._on_told)
        service.watch(self._clients.socket, self._clients.read)
        service.watch(self._clients.monitor, self._from_clients)

    def run(self) -> NoReturn:
        self._service.ready(", ".join(self._service.settings.client_endpoints))
        try:
            self._service.run(self._step, lambda: self._core.stats)
        finally:
            self._clients.close()
            self._service.close()

    def _from_clients(self) -> None:
        for connection in self._clients.gone():
            self._core.closed(connection)
        for connection, frame in self._clients.receive():
            self._core.receive(connection, frame)
            while (flooding := self._core.flooded()) is not None:
                self._clients.disconnect(flooding)

    def _from_services(self, event: Event[FromServices]) -> None:
        match event:
            case Received(message=Decoded() as decoded):
                self._core.from_detokenizer(decoded)
            case Received(peer=peer, message=(Missing() | EngineState() | Lost()) as message):
                self._core.from_scheduler(peer, message)
            case Received(peer=peer, message=message):
                self._core.from_tokenizer(peer, message)
            case Up(peer=peer):
                self._core.service_up(peer)
            case Down(peer=peer):
                self._core.service_down(peer)

    def _on_told(self, message: FromSupervisor) -> None:
        if isinstance(message, Drain):
            if self._drain_at is None:
                self._drain_at = time.monotonic() + message.resume_s
        elif isinstance(message, Vacate):
            self._core.vacate(message.engine, message.leaves)
        elif isinstance(message, Forget):
            self._core.forget(message.engine)
        elif isinstance(message, Crashed):
            self._core.quarantine.crashed(Peer.of(message.service, message.incarnation))

    def _step(self, now: float) -> float | None:
        core = self._core
        if self._drain_at is not None and now >= self._drain_at:
            core.drain()
        if now >= self._look_at_keys_at:
            self._look_at_keys_at = now + LOOK_AT_KEYS_S
            self._clients.cut_untrusted()
        core.work()
        core.submit()
        all_sent = self._send_to_services()
        for session in list(core.sessions.unsent):
            all_sent &= self._send_to_client(session, now)
        for engine in core.engines.vacated():
            self._service.vacated(engine)
        if core.drained:
            self._service.drained()
        if core.has_work:
            return 0.0
        if not all_sent:
            return RETRY_S
        if self._drain_at is None or core.drains:
            return None
        return max(0.0, self._drain_at - now)

    def _send_to_services(self) -> bool:
        """Sends all messages for services; returns False if a socket was full."""
        core = self._core
        return (
            self._send_frames(core.detokenizers)
            & self._send_frames(core.engines)
            & self._send_frames(core.tokenizers)
        )

    def _send_frames(self, outbox: Outbox[T]) -> bool:
        while frames := list(outbox.frames()):
            sent = [one for one in frames if self._services.send(*one)]
            for peer, frame in sent:
                outbox.sent(peer, frame)
            if not sent:
                return False
        return True

    def _send_to_client(self, session: Session, now: float) -> bool:
        """Sends all messages for the client; returns False if its socket was full."""
        while (frame := session.outgoing()) is not None:
            sent = self._clients.send(session.connection, frame)
            if sent is Sent.FULL:
                if not session.does_not_read(now):
                    return False
                self._clients.disconnect(session.connection)
            if sent is not Sent.DONE:
                self._core.closed(session.connection)
                return True
            self._core.sent(session)
        self._core.sessions.unsent.discard(session)
        return True


def serve(service: Service) -> NoReturn:
    Ingress(service).run()
