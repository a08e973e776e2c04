"""Starts the services of a pipeline, watches them, and ends them together."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import zmq

from nanovllm.launch.loading_bar import LoadingBar
from nanovllm.launch.processes import Lifeline, ServiceProcess, end_all
from nanovllm.links import BoundLink, Down, Event, Peer, Up, new_incarnation
from nanovllm.messages import Status, StatusRequest, ToSupervisor
from nanovllm.service import EXIT_MISCONFIGURED
from nanovllm.settings import Settings

# A service has this long to end after SIGTERM.
GRACE_S = 3.0


class ServiceDied(RuntimeError):
    """A service ended by itself; the message says which, how, and its last words."""


class Supervisor:
    """One pipeline's processes, from start to end.

    Args:
        settings: settled, see `service.settled`.
        model: the model's name as people know it.
        announce: called once, when every service is ready.
        lifeline: a descriptor that becomes readable when the program that started this one ends.
    """

    def __init__(
        self, settings: Settings, model: str, announce: Callable[[], None], lifeline: int | None
    ) -> None:
        self._settings = settings
        self._model = model
        self._announce = announce
        self._announced = False
        self._above = lifeline
        self._bar = LoadingBar()
        self._services: list[ServiceProcess] = []

    def run(self) -> None:
        """Runs the pipeline until it is told to stop.

        Raises:
            ServiceDied: when a service ends by itself. All the others have ended then too.
            EndpointTaken, OSError: if the control endpoint cannot be bound.
        """
        wakeup = _SignalPipe(signal.SIGCHLD, signal.SIGINT, signal.SIGTERM)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        below = Lifeline()
        control: BoundLink[Any] | None = None
        try:
            me = Peer("supervisor", 0, new_incarnation())
            control = BoundLink(context, self._settings.control_endpoint, me, ToSupervisor)
            for role, count in self._plan():
                for index in range(count):
                    self._services.append(ServiceProcess(role, index, self._settings, below))
            self._watch(control, wakeup)
        finally:
            self._bar.close()
            end_all(self._services, GRACE_S)
            below.close()
            if control is not None:
                control.close()
            context.term()
            wakeup.close()

    def _plan(self) -> list[tuple[str, int]]:
        return [
            ("ingress", 1),
            ("scheduler", 1),
            ("gpu_worker", self._settings.tensor_parallel_size),
            ("tokenizer", self._settings.tokenizers),
            ("detokenizer", self._settings.detokenizers),
        ]

    def _watch(self, control: BoundLink[Any], wakeup: _SignalPipe) -> None:
        poller = zmq.Poller()
        for socket in control.sockets:
            poller.register(socket, zmq.POLLIN)
        poller.register(wakeup.descriptor, zmq.POLLIN)
        if self._above is not None:
            poller.register(self._above, zmq.POLLIN)
        for service in self._services:
            poller.register(service.output, zmq.POLLIN)
        while True:
            readable = dict(poller.poll())
            for event in control.receive():
                self._on_event(control, event)
            ended = [s for s in self._services if s.process.poll() is not None]
            for service in self._services:
                for line in service.lines():
                    self._bar.write(f"{service} | {line}")
            if self._above in readable or wakeup.caught() & {signal.SIGINT, signal.SIGTERM}:
                return
            if ended:
                raise ServiceDied(_last_words(ended[0]))

    def _on_event(self, control: BoundLink[Any], event: Event[Any]) -> None:
        if isinstance(event, Up | Down):
            return
        if isinstance(event.message, StatusRequest):
            services = [service.status() for service in self._services]
            endpoint = self._settings.client_endpoints[0]
            control.send(event.peer, [Status(self._model, endpoint, services)])
            return
        for service in self._services:
            if service.is_peer(event.peer):
                service.note(event.message)
        if self._announced:
            return
        self._bar.show([service.status() for service in self._services])
        if all(service.ready for service in self._services):
            self._announced = True
            self._bar.close()
            self._announce()


class _SignalPipe:
    """Signals as bytes on a descriptor, so that one poll waits for them and for all else."""

    def __init__(self, *signals: signal.Signals) -> None:
        self.descriptor, self._write_end = os.pipe()
        os.set_blocking(self.descriptor, False)
        os.set_blocking(self._write_end, False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in signals}
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)

    def caught(self) -> set[int]:
        """The signals that have come since the last call."""
        try:
            return set(os.read(self.descriptor, 4096))
        except BlockingIOError:
            return set()

    def close(self) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self.descriptor)
        os.close(self._write_end)


def _last_words(service: ServiceProcess) -> str:
    code = service.process.returncode
    said = next((line for line in reversed(service.last_lines) if line), "")
    if code == EXIT_MISCONFIGURED and said:
        return f"{service} cannot start: {said.removeprefix('ERROR ')}"
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return f"{service} {how}" + (f": {said}" if said else "")
