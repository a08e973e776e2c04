"""Starts the services of a pipeline, and keeps them running until it is told to end.

What to do about a death, a hang or a command is decided in `policy.py`; here it is done.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import zmq

from nanovllm.control import (
    Crashed,
    Done,
    Drain,
    Drained,
    IngressStats,
    Loading,
    Ready,
    Report,
    Restart,
    Scale,
    ServiceStatus,
    Status,
    StatusRequest,
    ToSupervisor,
)
from nanovllm.launch.groups import (
    GRACE_S,
    Action,
    Answer,
    Blame,
    GiveUp,
    Kill,
    Place,
    Start,
    Stop,
    work_of,
)
from nanovllm.launch.policy import Policy
from nanovllm.launch.processes import Lifeline, ServiceProcess, end_all
from nanovllm.progress import LoadingBar
from nanovllm.service import EXIT_FOLLOWED, EXIT_MISCONFIGURED
from nanovllm.settings import MAX_SERVICES, Settings
from nanovllm.transport.links import BoundLink, Event, Peer, Received, Up, new_incarnation
from nanovllm.wording import counted

INGRESS = Place("ingress", 0)
ROLES = ("ingress", "scheduler", "gpu_worker", "tokenizer", "detokenizer")
# How long an ingress that is born into a drain takes requests: clients of the one before find out,
# and submit again what they had there.
RESUME_S = 5.0
SCALABLE = ("tokenizer", "detokenizer")


class ServiceFailed(RuntimeError):
    """A service cannot be kept running; the message says which, why, and its last words."""


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
        self._below = Lifeline()
        self._poller = zmq.Poller()
        self._policy = Policy(_groups(settings), time.monotonic())
        self._services: dict[Place, ServiceProcess] = {}
        self._ingress: Peer | None = None
        self._drain_until: float | None = None
        self._drain_untold_since = math.inf
        self._over = False

    def run(self) -> None:
        """Runs the pipeline until it is told to stop.

        Raises:
            ServiceFailed: when a service is given up. All the others have ended then too.
            EndpointTaken, EndpointUnusable: if the control endpoint cannot be bound.
        """
        wakeup = _SignalPipe(signal.SIGCHLD, signal.SIGINT, signal.SIGTERM)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        control: BoundLink[Any] | None = None
        try:
            me = Peer("supervisor", 0, new_incarnation())
            control = BoundLink(context, self._settings.control_endpoint, me, list[ToSupervisor])
            self._watch(control, wakeup)
        finally:
            self._bar.close()
            end_all([s for s in self._services.values() if s.alive], GRACE_S)
            self._below.close()
            if control is not None:
                control.close()
            context.term()
            wakeup.close()

    def _watch(self, control: BoundLink[Any], wakeup: _SignalPipe) -> None:
        for socket in control.sockets:
            self._poller.register(socket, zmq.POLLIN)
        self._poller.register(wakeup.descriptor, zmq.POLLIN)
        if self._above is not None:
            self._poller.register(self._above, zmq.POLLIN)
        wait_s = 0.0
        while not self._over:
            readable = dict(self._poller.poll(int(wait_s * 1000) + 1))
            now = time.monotonic()
            for event in control.receive():
                self._on_event(control, event, now)
            self._on_signals(control, wakeup.caught(), now)
            self._look_after_processes(now)
            for action in self._policy.due(now, _busy(control)):
                self._do(control, action)
            self._show()
            if self._drain_until is not None and now >= self._drain_until:
                self._bar.write("supervisor | requests that are unfinished end here")
                self._over = True
            self._over = self._over or self._above in readable
            wait_s = self._policy.wait_s(now)

    # What happens -------------------------------------------------------------------------------

    def _on_event(self, control: BoundLink[Any], event: Event[Any], now: float) -> None:
        peer = event.peer
        if peer.role == "command":
            if isinstance(event, Received):
                self._on_command(control, peer, event.message, now)
            return
        place = Place(peer.role, peer.index)
        service = self._services.get(place)
        if service is None or control.pids.get(peer) != service.process.pid:
            return  # gone meanwhile
        service.incarnation = peer.incarnation
        self._policy.sign(place, now)
        match event:
            case Up() if place == INGRESS:
                self._ingress = peer
                if self._drain_until is not None:
                    control.send(peer, [Drain(RESUME_S)])
            case Received(message=Drained()):
                self._over = True
            case Received(message=Loading() | Ready() | Report() as said):
                service.note(said)
                if isinstance(said, Ready):
                    self._policy.ready(place, now)
                elif isinstance(said, Report):
                    self._policy.work(place, work_of(said.stats), now)
                    self._tell_of_drain(said)

    def _on_command(self, control: BoundLink[Any], asker: Peer, asked: Any, now: float) -> None:
        match asked:
            case StatusRequest():
                endpoint = self._settings.client_endpoints[0]
                control.send(asker, [Status(self._model, endpoint, self._statuses())])
            case Scale(role=role, count=count):
                if role in SCALABLE and 1 <= count <= MAX_SERVICES:
                    self._policy.scale(role, count, asker, now)
                else:
                    roles = " and ".join(f"{name}s" for name in SCALABLE)
                    error = f"only {roles} can be scaled, to 1 to {MAX_SERVICES}"
                    control.send(asker, [Done(error)])
            case Restart(role=role):
                if role in (*ROLES, "all"):
                    self._policy.restart(role, asker)
                else:
                    error = f"there is no {role!r}; there are {', '.join(ROLES)}, and all"
                    control.send(asker, [Done(error)])

    def _on_signals(self, control: BoundLink[Any], caught: set[int], now: float) -> None:
        """The first asks for a drain, the second for the end."""
        if not caught & {signal.SIGINT, signal.SIGTERM}:
            return
        if not self._announced or self._drain_until is not None:
            self._over = True
            return
        self._drain_until = now + self._settings.drain_timeout
        if self._above is None:  # else there is nobody to press Ctrl-C again
            self._drain_untold_since = now
        if self._ingress is not None:  # else when it is there
            control.send(self._ingress, [Drain(0.0)])

    def _tell_of_drain(self, report: Report) -> None:
        """Says, once, what the end waits for, if it does."""
        stats = report.stats
        if not isinstance(stats, IngressStats) or report.at_s < self._drain_untold_since:
            return
        if stats.requests:
            self._drain_untold_since = math.inf
            self._bar.write(
                f"supervisor | draining: {counted(stats.requests, 'request')} unfinished,"
                f" {self._settings.drain_timeout:g} s at most; Ctrl-C again ends at once"
            )

    def _look_after_processes(self, now: float) -> None:
        """Passes on what they wrote, and notes who has ended."""
        ended: list[ServiceProcess] = []
        alive = [service for service in self._services.values() if service.alive]
        if any(service.process.poll() is not None for service in alive):
            # Looked at again: one that has ended because another had is not seen before it.
            ended = [service for service in alive if service.process.poll() is not None]
        for service in alive:
            for line in service.lines():
                self._bar.write(f"{service.place} | {line}")
        for service in sorted(ended, key=_nearness_to_the_cause):
            self._poller.unregister(service.output)
            service.close()
            self._policy.ended(service.place, service.process.returncode, now)
            if service.stopping is None and not self._policy.gives_up:  # the last words tell it
                self._bar.write(f"supervisor | {service.place} {service.how_it_ended()}")

    # What is done -------------------------------------------------------------------------------

    def _do(self, control: BoundLink[Any], action: Action) -> None:
        match action:
            case Start(place=place):
                service = ServiceProcess(place, self._settings, self._below)
                self._services[place] = service
                self._poller.register(service.output, zmq.POLLIN)
            case Stop(place=place):
                self._services[place].stop(signal.SIGTERM)
            case Kill(place=place, why=why):
                if why:
                    self._bar.write(f"supervisor | {place} is killed: {why}")
                    if not self._services[place].stopped:
                        self._blame(control, place)
                self._services[place].stop(signal.SIGKILL)
            case Blame(place=place):
                self._blame(control, place)
            case GiveUp(place=place, times=times):
                raise ServiceFailed(_last_words(self._services[place], times))
            case Answer(asked_by=peer):
                control.send(peer, [Done(None)])

    def _blame(self, control: BoundLink[Any], place: Place) -> None:
        """The ingress is to know that a service died by itself: what it had in hand is suspect."""
        group = self._policy.group_of(place)
        first = place if group is None else group.places[0]
        incarnation = self._services[first].incarnation
        if self._ingress is not None and incarnation is not None:
            control.send(self._ingress, [Crashed(first.role, first.index, incarnation)])

    def _show(self) -> None:
        if self._announced:
            return
        self._bar.show(self._statuses())
        if self._policy.all_ready:
            self._announced = True
            self._bar.close()
            self._announce()

    def _statuses(self) -> list[ServiceStatus]:
        return [
            self._services[place].status(max(0, group.restarts))
            for group in self._policy.groups
            for place in group.places
            if place in self._services
        ]


def _groups(settings: Settings) -> list[list[Place]]:
    """one_for_all for the ranks of a tensor-parallel group, one_for_one for all others."""
    return [
        [INGRESS],
        [Place("scheduler", 0)],
        [Place("gpu_worker", rank) for rank in range(settings.tensor_parallel_size)],
        *[[Place("tokenizer", index)] for index in range(settings.tokenizers)],
        *[[Place("detokenizer", index)] for index in range(settings.detokenizers)],
    ]


def _busy(control: BoundLink[Any]) -> set[Place]:
    """Services that may say nothing for long because their loop is at work: a tokenizer, while it
    encodes. That it lives is seen by the connection, which ZeroMQ's thread there keeps."""
    return {Place(p.role, p.index) for p in control.peers if p.role == "tokenizer"}


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


def _nearness_to_the_cause(service: ServiceProcess) -> tuple[bool, bool, bool]:
    """Of ranks that have ended together, whoever knows why comes first, then who was killed: the
    others only followed."""
    code = service.process.returncode
    return code != EXIT_MISCONFIGURED, code == EXIT_FOLLOWED, code > 0


def _last_words(service: ServiceProcess, times: int) -> str:
    how = f"{service.place} {service.how_it_ended()}"
    if service.reason is not None:
        return how
    said = [line for line in service.last_lines if line]
    how += " before it was ready"
    how += f", {times} times in a row" if times > 1 else ""
    return "\n  ".join([f"{how}: {said[-1]}" if said else how, *said[:-1]])
