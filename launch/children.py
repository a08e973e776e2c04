"""The processes of the services that run here: their start, output and status."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
import zmq

from nanovllm.control import ServiceStatus
from nanovllm.launch.gpus import Gpus
from nanovllm.launch.groups import GRACE_S, Group
from nanovllm.launch.http import Listener
from nanovllm.launch.processes import Lifeline, ServiceProcess, end_all
from nanovllm.log import render
from nanovllm.names import ServiceId
from nanovllm.quietly import QUIET_VARIABLE
from nanovllm.settings import Settings


class Children:
    """The latest process of each service.

    Args:
        settings: of the services.
        first: the number of the first engine.
        gpus: which each engine takes.
        listener: what HTTP servers inherit; None if there are none.
        poller: wakes up the supervisor when a service has written something.
        show: takes lines for people.
    """

    def __init__(
        self,
        settings: Settings,
        first: int,
        gpus: Gpus,
        listener: Listener | None,
        poller: zmq.Poller,
        show: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._first = first
        self._gpus = gpus
        self._listener = listener
        self._poller = poller
        self._show = show
        self._lifeline = Lifeline()
        self.of: dict[ServiceId, ServiceProcess] = {}

    def start(self, service_id: ServiceId, quietly: bool) -> None:
        """Starts a process, which yields the CPU until it is ready if it is to be `quietly`."""
        environment: dict[str, str] = {}
        descriptors: list[int] = []
        if service_id.role == "http" and self._listener is not None:
            environment, descriptors = self._listener.environment, self._listener.descriptors
        elif service_id.role == "gpu_worker":
            environment = self._gpus.environment(service_id.engine - self._first)
            if quietly:
                environment[QUIET_VARIABLE] = "1"
        settings = msgspec.structs.replace(self._settings, engines=self._gpus.engines)
        process = ServiceProcess(service_id, settings, self._lifeline, environment, descriptors)
        self.of[service_id] = process
        self._poller.register(process.output, zmq.POLLIN)

    def look_after(self) -> list[ServiceProcess]:
        """Passes on the services' output. Returns those that have ended, first the cause of the
        ends of others."""
        ended: list[ServiceProcess] = []
        alive = [service for service in self.of.values() if service.alive]
        if any(service.process.poll() is not None for service in alive):
            # Polled again, so that no service is seen before another whose end was the cause.
            ended = [service for service in alive if service.process.poll() is not None]
        for service in alive:
            if events := service.events():
                log_format = self._settings.log_format
                self._show("\n".join(render(event, log_format) for event in events))
        for service in ended:
            self._poller.unregister(service.output)
            service.close()
        return sorted(ended, key=ServiceProcess.distance_from_the_cause)

    @property
    def flood(self) -> bool:
        """Whether a service has written more than one wake-up reads."""
        return any(service.floods for service in self.of.values())

    def statuses(self, groups: Iterable[Group]) -> list[ServiceStatus]:
        return [
            self.of[service_id].status(max(0, group.restarts))
            for group in groups
            for service_id in group.services
            if service_id in self.of
        ]

    def end(self) -> None:
        """Ends all of them."""
        end_all([service for service in self.of.values() if service.alive], GRACE_S)
        self._lifeline.close()
