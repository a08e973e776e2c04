"""Starts the services of a pipeline, and keeps them running until told to end.

`policy.py` decides what to do about a death, a hang or a command; the supervisor does it.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable

import zmq

from nanovllm.control import (
    Crashed,
    Done,
    Drain,
    Drained,
    Health,
    HealthRequest,
    KillService,
    Left,
    Loading,
    Over,
    Ready,
    Report,
    Restart,
    Scale,
    Services,
    ServiceStatus,
    Status,
    StatusRequest,
    ToSupervisor,
    Vacate,
    Vacated,
)
from nanovllm.launch.children import Children
from nanovllm.launch.commands import PIPELINE, Commands
from nanovllm.launch.draining import Draining
from nanovllm.launch.gpus import Gpus
from nanovllm.launch.groups import (
    GRACE_S,
    Action,
    Answer,
    Blame,
    GiveUp,
    Kill,
    Move,
    Start,
    Stop,
    TakeBack,
    work_of,
)
from nanovllm.launch.http import Listener
from nanovllm.launch.join import Membership
from nanovllm.launch.layout import INGRESS, groups_of
from nanovllm.launch.machines import Machines
from nanovllm.launch.notify import Notifier
from nanovllm.launch.policy import Policy
from nanovllm.launch.processes import SignalPipe
from nanovllm.names import ENGINE_ROLES, ServiceId, first_of
from nanovllm.progress import LoadingBar
from nanovllm.settings import Settings
from nanovllm.transport.links import BoundLink, Event, Peer, Received, Up, new_incarnation

log = logging.getLogger(__name__)

# Between two wake-ups while a service floods its output: no more than that is read of it, and it
# takes little of a core.
FLOOD_PAUSE_S = 0.02
# How often the pipeline is told of the services that have joined it.
TELL_S = 0.5


class ServiceFailed(RuntimeError):
    """A service was given up; the message says which and why, with the last lines of its output."""


class Supervisor:
    """One pipeline's processes, from start to end.

    Args:
        settings: as `service.settled` returns them.
        model: the model's name, for people.
        bar: shows the start.
        gpus: which each engine takes.
        listener: what HTTP servers inherit; None if there are none.
        announce: called once, when every service is ready.
        notifier: tells the service manager how they do.
        lifeline: a descriptor that becomes readable when the program that owns the pipeline ends;
            None if a person started the pipeline.
        machines: those that join the pipeline; None if none can.
        membership: in the pipeline that these services join; None if they are the pipeline.

    Raises:
        EndpointTaken, EndpointUnusable: the control endpoint cannot be bound.
    """

    def __init__(
        self,
        settings: Settings,
        model: str,
        bar: LoadingBar,
        gpus: Gpus,
        listener: Listener | None,
        announce: Callable[[], None],
        notifier: Notifier,
        lifeline: int | None,
        machines: Machines | None = None,
        membership: Membership | None = None,
    ) -> None:
        self._settings = settings
        self._machines = machines
        self._membership = membership
        self._asked: list[Peer] = []  # who waits for the status of the whole pipeline
        self._beat_at = 0.0
        self._told_to_drain = False  # by the pipeline, which is not told yet when it has
        self._model = model
        self._listener = listener
        self._announce = announce
        self._announced = False
        self._notifier = notifier
        self._owner = lifeline
        self._bar = bar
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._me = Peer("supervisor", 0, new_incarnation())
        self._control = BoundLink(
            self._context, settings.control_endpoint, self._me, list[ToSupervisor]
        )
        self._poller = zmq.Poller()
        first = first_of(membership.joined.number) if membership else 0
        groups = groups_of(settings, first)
        self._policy = Policy(groups, time.monotonic(), self._grace_s, first)
        self._children = Children(settings, first, gpus, listener, self._poller, bar.write)
        self._draining = Draining(self._control, self._children, settings.drain_timeout)
        self._commands = Commands(
            settings,
            first,
            gpus,
            self._policy,
            machines,
            joined=membership is not None,
            serves_http=listener is not None,
            answer=self._answer,
        )
        self._ingress: Peer | None = None
        self._over = False

    def run(self) -> None:
        """Runs the pipeline until told to stop; then every service has ended.

        Raises:
            ServiceFailed: a service was given up; every other service has ended too.
            SettingsError, JoinedAnew: see `Membership.receive`.
        """
        wakeup = SignalPipe(signal.SIGCHLD, signal.SIGINT, signal.SIGTERM)
        try:
            self._watch(wakeup)
        finally:
            self._bar.close()
            self._commands.close()
            self._children.end()
            self._control.close()
            self._context.term()
            wakeup.close()

    def _watch(self, wakeup: SignalPipe) -> None:
        links = (self._control, self._machines, self._membership)
        for socket in [socket for link in links if link for socket in link.sockets]:
            self._poller.register(socket, zmq.POLLIN)
        self._poller.register(wakeup.descriptor, zmq.POLLIN)
        if self._owner is not None:
            self._poller.register(self._owner, zmq.POLLIN)
        wait_s = 0.0
        while not self._over:
            readable = dict(self._poller.poll(int(wait_s * 1000) + 1))
            now = time.monotonic()
            for event in self._control.receive():
                self._on_event(event, now)
            if self._machines is not None:
                self._hear_machines(self._machines, now)
            if self._membership is not None:
                self._hear_pipeline(self._membership, now)
            self._on_signals(wakeup.caught(), now)
            self._look_after_children(now)
            for action in self._policy.due(now, self._connected()):
                self._do(action)
            self._show()
            if self._draining.until is not None and self._all_drained():
                self._over = True
            elif self._draining.until is not None and now >= self._draining.until:
                if self._membership is None:
                    log.warning("requests that are unfinished end here")
                self._over = True
            self._over = self._over or self._owner in readable
            self._notify(now)
            wait_s = min(self._policy.wait_s(now), self._notifier.wait_s(now))
            if self._children.flood:
                time.sleep(FLOOD_PAUSE_S)

    # What happened ------------------------------------------------------------------------------

    def _on_event(self, event: Event[ToSupervisor], now: float) -> None:
        peer = event.peer
        if peer.role == "command":
            match event:
                case Received(message=StatusRequest()):
                    self._tell_status(peer)
                case Received(message=HealthRequest()):
                    self._control.send(peer, [Health(self._missing())])
                case Received(message=Scale() | Restart() as command):
                    self._commands.ask(peer, command, now)
            return
        service_id = peer.service
        service, group = self._children.of.get(service_id), self._policy.group_of(service_id)
        if service is None or self._control.pids.get(peer) != service.process.pid or group is None:
            return  # from a process that has ended, or another one
        service.incarnation = peer.incarnation
        group.sign(service_id, now)
        match event:
            case Up():
                if service_id == INGRESS:
                    self._ingress = peer
                    for move in self._policy.vacating:
                        self._do(move)
                    for vacate in self._machines.leaving if self._machines else []:
                        self._tell_ingress(vacate)
                self._draining.connected(peer)
            case Received(message=StatusRequest()):
                self._tell_status(peer)
            case Received(message=KillService() as kill) if peer.role == "http":
                self._kill(kill)
            case Received(message=Vacated(engine=engine)):
                self._policy.moved(engine)
                if self._machines is not None:
                    self._machines.vacated(engine)
            case Received(message=Drained()):
                self._draining.drained.add(service_id)
            case Received(message=Loading() | Ready() | Report() as said):
                service.note(said)
                if isinstance(said, Ready):
                    group.ready(service_id, now)
                elif isinstance(said, Report):
                    group.work(service_id, work_of(said.stats), now)
                    self._draining.reported(said)

    def _answer(self, asker: Peer, done: Done) -> None:
        if asker == PIPELINE and self._membership is not None:
            self._tell_services(self._membership)  # so that the asker sees what is done
            self._membership.send(done)
        else:
            self._control.send(asker, [done])

    def _tell_status(self, asker: Peer) -> None:
        if self._membership is not None and self._membership.send(StatusRequest()):
            self._asked.append(asker)
        else:
            self._control.send(asker, [self._status()])

    def _hear_machines(self, machines: Machines, now: float) -> None:
        for peer, message in machines.receive():
            if isinstance(message, StatusRequest):
                machines.tell(peer, self._status())
            elif not self._tell_ingress(message) and isinstance(message, Vacate):
                machines.vacated(message.engine)
        for forget in machines.forget(now):
            if self._ingress is not None:  # one that comes later will not know the engine
                self._control.send(self._ingress, [forget])
        for asker, error in machines.answers():
            self._commands.done(asker, error)

    def _hear_pipeline(self, membership: Membership, now: float) -> None:
        for message in membership.receive():
            match message:
                case Status():
                    for asker in self._asked:
                        self._control.send(asker, [message])
                    self._asked.clear()
                case Vacated(engine=engine):
                    self._policy.moved(engine)
                case Scale() | Restart():
                    self._commands.ask(PIPELINE, message, now)
                case KillService():
                    self._kill(message)
                case Drain():
                    self._told_to_drain = True
                    self._draining.begin()
                case Over():
                    log.info("the pipeline ends")
                    membership.send(Left())
                    self._over = True
        if now >= self._beat_at:
            self._beat_at = now + TELL_S
            membership.heartbeat()
            self._tell_services(membership)
        if self._told_to_drain and self._draining.doors_drained:
            self._told_to_drain = not membership.send(Drained())

    def _tell_services(self, membership: Membership) -> None:
        leaving = [move.engine for move in self._policy.vacating if move.leaves]
        membership.send(Services(self._statuses(), leaving))

    def _on_signals(self, caught: set[int], now: float) -> None:
        """The first SIGINT or SIGTERM drains, the second ends the pipeline."""
        if not caught & {signal.SIGINT, signal.SIGTERM}:
            return
        if not self._announced or self._draining.until is not None:
            self._over = True
            return
        self._draining.end(now, announce=self._owner is None)  # there is a person to tell
        if self._machines is not None:
            self._machines.drain()
        if self._membership is not None:
            self._policy.scale("engine", 0, lambda _: [], self._me, now)

    def _look_after_children(self, now: float) -> None:
        """Passes on the services' output, and tells the policy whose process has ended."""
        for service in self._children.look_after():
            self._draining.drained.discard(service.id)
            if (group := self._policy.group_of(service.id)) is not None:
                group.ended(service.id, service.process.returncode, now)
            # If the policy gives up, `ServiceFailed` says how the service ended.
            if service.stopping is None and not self._policy.gives_up:
                log.warning("%s %s", service.id, service.how_it_ended())

    # What to do ---------------------------------------------------------------------------------

    def _do(self, action: Action) -> None:
        services = self._children.of
        match action:
            case Start(service=service_id):
                self._children.start(service_id, quietly=self._policy.runs("gpu_worker"))
            case Stop(service=service_id):
                services[service_id].stop(signal.SIGTERM)
            case Kill(service=service_id, why=why):
                if why:
                    log.warning("%s is killed: %s", service_id, why)
                    if not services[service_id].stopped:
                        self._blame(service_id)
                services[service_id].stop(signal.SIGKILL)
            case Blame(service=service_id):
                self._blame(service_id)
            case GiveUp(service=service_id, times=times):
                raise ServiceFailed(services[service_id].last_words(times))
            case TakeBack(service=service_id, times=times, asked_by=peers):
                why = services[service_id].last_words(times)
                log.error("%s\nit is given up; the other services go on", why)
                for peer in peers:
                    self._commands.done(peer, f"{why}; the other services go on")
            case Move(engine=engine, leaves=leaves):
                if not self._tell_ingress(Vacate(engine, leaves)):
                    self._policy.moved(engine)
            case Answer(asked_by=peer):
                self._commands.done_here(peer)

    def _kill(self, command: KillService) -> None:
        """Kills a service as someone outside would: nobody is blamed, and no restart is counted
        against the group."""
        service = self._children.of.get(command.service)
        group = self._policy.group_of(command.service)
        if service is not None and group is not None:
            if service.alive and group.settled:
                log.warning("%s is killed: the page was asked to", service.id)
                service.process.kill()
        elif self._machines is not None:
            self._machines.kill(command)

    def _blame(self, service_id: ServiceId) -> None:
        """Tells the ingress that a service ended by itself: the requests it held are suspect."""
        group = self._policy.group_of(service_id)
        first = service_id if group is None else group.services[0]
        incarnation = self._children.of[first].incarnation
        if incarnation is not None:
            self._tell_ingress(Crashed(first, incarnation))

    def _tell_ingress(self, message: Crashed | Vacate) -> bool:
        """Returns False if the ingress is not there."""
        if self._membership is not None:
            return self._membership.send(message)
        return self._ingress is not None and self._control.send(self._ingress, [message])

    def _show(self) -> None:
        if self._announced:
            return
        self._bar.show(self._statuses())
        if self._policy.all_ready:
            self._announced = True
            self._bar.close()
            self._announce()

    def _notify(self, now: float) -> None:
        missing = self._missing()
        stopping = self._over or self._draining.until is not None
        status = missing or f"serves {self._model}"
        self._notifier.tell(now, status, ready=not missing, stopping=stopping)

    def _missing(self) -> str:
        """What keeps the services of this machine from working; empty if nothing does."""
        if self._over or self._draining.until is not None:
            return "it is being stopped"
        waited_for = [str(s) for g in self._policy.groups if not g.settled for s in g.services]
        if waited_for:
            return f"not ready: {', '.join(waited_for)}"
        if self._membership is not None and not self._membership.connected:
            return f"the pipeline at {self._settings.join} is not reached"
        return ""

    def _connected(self) -> set[ServiceId]:
        """The services whose connection stands: the I/O thread of ZeroMQ keeps it up, also while a
        loop is silent."""
        return {peer.service for peer in self._control.peers}

    def _all_drained(self) -> bool:
        """Whether no request is left: where services have joined a pipeline, in their engines."""
        if not self._draining.doors_drained:
            return False
        if self._membership is not None:
            return not any(g.services[0].role in ENGINE_ROLES for g in self._policy.groups)
        drained = INGRESS in self._draining.drained
        return drained and (self._machines is None or self._machines.drained)

    def _grace_s(self, role: str) -> float:
        return GRACE_S + (self._settings.drain_timeout if role == "http" else 0.0)

    def _status(self) -> Status:
        url = self._listener.url if self._listener else ""
        endpoint = self._settings.client_endpoints[0]
        others = self._machines.statuses if self._machines else []
        return Status(self._model, endpoint, url, self._statuses() + others)

    def _statuses(self) -> list[ServiceStatus]:
        return self._children.statuses(self._policy.groups)
