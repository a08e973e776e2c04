"""Starts the services of a pipeline, and keeps them running until told to end.

`policy.py` decides what to do about a death, a hang or a command; the supervisor does it.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable

import msgspec
import zmq

from nanovllm.control import (
    Crashed,
    Done,
    Drain,
    Drained,
    Health,
    HealthRequest,
    IngressStats,
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
    ToMachine,
    ToSupervisor,
    Vacate,
    Vacated,
)
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
from nanovllm.launch.machines import Machines
from nanovllm.launch.notify import Notifier
from nanovllm.launch.policy import Policy
from nanovllm.launch.processes import Lifeline, ServiceProcess, SignalPipe, end_all
from nanovllm.log import render
from nanovllm.names import ENGINE_ROLES, ServiceId, first_of
from nanovllm.progress import LoadingBar
from nanovllm.quietly import QUIET_VARIABLE
from nanovllm.settings import MAX_SERVICES, RESTARTABLE, SCALABLE, Settings, SettingsError
from nanovllm.transport.links import BoundLink, Event, Peer, Received, Up, new_incarnation
from nanovllm.wording import counted

log = logging.getLogger(__name__)

INGRESS = ServiceId("ingress", 0)
# Who asks for what another machine's supervisor passes on.
PIPELINE = Peer("pipeline", 0, 0)
DRAINED_ROLES = ("ingress", "http")
# How long an ingress that starts during a drain takes requests, so that the clients of the ingress
# before can submit their unfinished requests again.
RESUME_S = 5.0
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
        self._first = first_of(membership.joined.number) if membership else 0
        self._relayed: dict[Peer, Restart] = {}
        self._asked: list[Peer] = []  # who waits for the status of the whole pipeline
        self._beat_at = 0.0
        self._pipeline_drains = False
        self._model = model
        self._gpus = gpus
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
        self._lifeline = Lifeline()
        self._poller = zmq.Poller()
        groups = _groups(settings, self._first)
        self._policy = Policy(groups, time.monotonic(), self._grace_s, self._first)
        self._services: dict[ServiceId, ServiceProcess] = {}
        self._ingress: Peer | None = None
        self._drained: set[ServiceId] = set()
        self._drain_until: float | None = None
        self._drain_unannounced_since = math.inf
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
            end_all([s for s in self._services.values() if s.alive], GRACE_S)
            self._lifeline.close()
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
            self._look_after_processes(now)
            for action in self._policy.due(now, self._connected()):
                self._do(action)
            self._show()
            if self._drain_until is not None and self._all_drained():
                self._over = True
            elif self._drain_until is not None and now >= self._drain_until:
                if self._membership is None:
                    log.warning("requests that are unfinished end here")
                self._over = True
            self._over = self._over or self._owner in readable
            self._notify(now)
            wait_s = min(self._policy.wait_s(now), self._notifier.wait_s(now))
            if any(service.floods for service in self._services.values()):
                time.sleep(FLOOD_PAUSE_S)

    # What happened ------------------------------------------------------------------------------

    def _on_event(self, event: Event[ToSupervisor], now: float) -> None:
        peer = event.peer
        if peer.role == "command":
            if isinstance(event, Received):
                self._on_command(peer, event.message, now)
            return
        service_id = peer.service
        service, group = self._services.get(service_id), self._policy.group_of(service_id)
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
                drains = self._drain_until is not None or self._pipeline_drains
                if drains and peer.role in DRAINED_ROLES:
                    self._control.send(peer, [Drain(RESUME_S)])
            case Received(message=StatusRequest()):
                self._tell_status(peer)
            case Received(message=KillService() as kill) if peer.role == "http":
                self._kill(kill)
            case Received(message=Vacated(engine=engine)):
                self._policy.moved(engine)
                if self._machines is not None:
                    self._machines.vacated(engine)
            case Received(message=Drained()):
                self._drained.add(service_id)
            case Received(message=Loading() | Ready() | Report() as said):
                service.note(said)
                if isinstance(said, Ready):
                    group.ready(service_id, now)
                elif isinstance(said, Report):
                    group.work(service_id, work_of(said.stats), now)
                    self._announce_drain(said)

    def _on_command(self, asker: Peer, command: ToSupervisor | ToMachine, now: float) -> None:
        fewest = 0 if self._machines or self._membership else 1
        match command:
            case StatusRequest():
                self._tell_status(asker)
            case HealthRequest():
                self._control.send(asker, [Health(self._missing())])
            case Scale(machine=machine) if machine and self._machines is not None:
                self._machines.command(asker, command)
            case Scale(machine=machine) if machine and asker != PIPELINE:
                why = (
                    "no machine has joined"
                    if self._membership is None
                    else ("only the main machine reaches others; those here are scaled without it")
                )
                self._done(asker, f"--machine {machine}: {why}")
            case Scale(role="http") | Restart(role="http") if (
                self._listener is None and self._machines is None and self._membership is None
            ):
                self._done(asker, "this pipeline serves no HTTP: launch it with --http HOST:PORT")
            case Scale(role="http") if self._listener is None:
                self._done(asker, "this machine serves no HTTP: launch it with --http HOST:PORT")
            case Scale(role=role, count=count):
                if role in SCALABLE and fewest <= count <= MAX_SERVICES:
                    self._scale(role, count, asker, now)
                else:
                    roles = ", ".join(SCALABLE)
                    self._done(asker, f"only {roles} can be scaled, to {fewest} to {MAX_SERVICES}")
            case Restart(role=role):
                if role in RESTARTABLE:
                    self._relayed[asker] = command
                    self._policy.restart(role, asker)
                else:
                    self._done(asker, f"there is no {role!r}; there are {', '.join(RESTARTABLE)}")

    def _done(self, asker: Peer, error: str | None = None) -> None:
        if asker == PIPELINE and self._membership is not None:
            self._tell_services(self._membership)  # so that the asker sees what is done
            self._membership.send(Done(error))
        else:
            self._control.send(asker, [Done(error)])

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
        for vacate in machines.forget(now):
            self._tell_ingress(vacate)  # one that is not there will not know the engine
        for asker, done in machines.answers():
            self._control.send(asker, [done])

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
                    self._on_command(PIPELINE, message, now)
                case KillService():
                    self._kill(message)
                case Drain():
                    self._pipeline_drains = True
                    self._drain()
                case Over():
                    log.info("the pipeline ends")
                    membership.send(Left())
                    self._over = True
        if now >= self._beat_at:
            self._beat_at = now + TELL_S
            membership.heartbeat()
            self._tell_services(membership)
        if self._pipeline_drains and self._drained >= self._doors:
            self._pipeline_drains = not membership.send(Drained())

    def _tell_services(self, membership: Membership) -> None:
        leaving = [move.engine for move in self._policy.vacating if move.leaves]
        membership.send(Services(self._statuses(), leaving))

    def _scale(self, role: str, count: int, asker: Peer, now: float) -> None:
        def services(number: int) -> list[list[ServiceId]]:
            if role == "engine":
                return _engine(self._settings, number)
            return [[ServiceId(role, number)]]

        if role == "engine":
            try:
                self._gpus.check(count)
            except SettingsError as error:
                self._done(asker, str(error))
                return
            self._settings = msgspec.structs.replace(self._settings, engines=count)
        self._policy.scale(role, count, services, asker, now)

    def _on_signals(self, caught: set[int], now: float) -> None:
        """The first SIGINT or SIGTERM drains, the second ends the pipeline."""
        if not caught & {signal.SIGINT, signal.SIGTERM}:
            return
        if not self._announced or self._drain_until is not None:
            self._over = True
            return
        self._drain_until = now + self._settings.drain_timeout
        if self._owner is None:  # there is a person to tell
            log.info("stopping")
            self._drain_unannounced_since = now
        self._drain()
        if self._membership is not None:
            self._policy.scale("engine", 0, lambda _: [], self._me, now)

    def _drain(self) -> None:
        for peer in self._control.peers:  # the others are told when they connect
            if peer.role in DRAINED_ROLES:
                self._control.send(peer, [Drain(0.0)])
        if self._machines is not None:
            self._machines.drain()

    def _announce_drain(self, report: Report) -> None:
        """Says once how many requests the drain waits for, if any."""
        stats = report.stats
        if not isinstance(stats, IngressStats) or report.at_s < self._drain_unannounced_since:
            return
        if stats.requests:
            self._drain_unannounced_since = math.inf
            log.info(
                "draining: %s unfinished, %g s at most; Ctrl-C again ends at once",
                counted(stats.requests, "request"),
                self._settings.drain_timeout,
            )

    def _look_after_processes(self, now: float) -> None:
        """Passes on the services' output, and tells the policy whose process has ended."""
        ended: list[ServiceProcess] = []
        alive = [service for service in self._services.values() if service.alive]
        if any(service.process.poll() is not None for service in alive):
            # Polled again, so that no service is seen before another whose end was the cause.
            ended = [service for service in alive if service.process.poll() is not None]
        for service in alive:
            if events := service.events():
                log_format = self._settings.log_format
                self._bar.write("\n".join(render(event, log_format) for event in events))
        for service in sorted(ended, key=ServiceProcess.distance_from_the_cause):
            self._poller.unregister(service.output)
            service.close()
            self._drained.discard(service.id)
            if (group := self._policy.group_of(service.id)) is not None:
                group.ended(service.id, service.process.returncode, now)
            # If the policy gives up, `ServiceFailed` says how the service ended.
            if service.stopping is None and not self._policy.gives_up:
                log.warning("%s %s", service.id, service.how_it_ended())

    # What to do ---------------------------------------------------------------------------------

    def _do(self, action: Action) -> None:
        match action:
            case Start(service=service_id):
                service = ServiceProcess(
                    service_id, self._settings, self._lifeline, *self._inherited(service_id)
                )
                self._services[service_id] = service
                self._poller.register(service.output, zmq.POLLIN)
            case Stop(service=service_id):
                self._services[service_id].stop(signal.SIGTERM)
            case Kill(service=service_id, why=why):
                if why:
                    log.warning("%s is killed: %s", service_id, why)
                    if not self._services[service_id].stopped:
                        self._blame(service_id)
                self._services[service_id].stop(signal.SIGKILL)
            case Blame(service=service_id):
                self._blame(service_id)
            case GiveUp(service=service_id, times=times):
                raise ServiceFailed(self._services[service_id].last_words(times))
            case TakeBack(service=service_id, times=times, asked_by=peers):
                why = self._services[service_id].last_words(times)
                log.error("%s\nit is given up; the other services go on", why)
                for peer in peers:
                    self._control.send(peer, [Done(f"{why}; the other services go on")])
            case Move(engine=engine, leaves=leaves):
                if not self._tell_ingress(Vacate(engine, leaves)):
                    self._policy.moved(engine)
            case Answer(asked_by=peer):
                command = self._relayed.pop(peer, None)
                if command is None or self._machines is None:
                    self._done(peer)
                else:
                    self._machines.command(peer, command)

    def _kill(self, command: KillService) -> None:
        """Kills a service as someone outside would: nobody is blamed, and no restart is counted
        against the group."""
        service, group = self._services.get(command.service), self._policy.group_of(command.service)
        if service is not None and group is not None:
            if service.alive and group.settled:
                log.warning("%s is killed: the page was asked to", service.id)
                service.process.kill()
        elif self._machines is not None:
            self._machines.kill(command)

    def _inherited(self, service_id: ServiceId) -> tuple[dict[str, str], list[int]]:
        """Environment and descriptors that this service has beside the launcher's."""
        if service_id.role == "http" and self._listener is not None:
            return self._listener.environment, self._listener.descriptors
        if service_id.role == "gpu_worker":
            engine = service_id.engine - self._first
            environment = self._gpus.environment(engine, self._settings.engines)
            if self._policy.runs(service_id.role):
                environment[QUIET_VARIABLE] = "1"
            return environment, []
        return {}, []

    def _blame(self, service_id: ServiceId) -> None:
        """Tells the ingress that a service ended by itself: the requests it held are suspect."""
        group = self._policy.group_of(service_id)
        first = service_id if group is None else group.services[0]
        incarnation = self._services[first].incarnation
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
        stopping = self._over or self._drain_until is not None
        status = missing or f"serves {self._model}"
        self._notifier.tell(now, status, ready=not missing, stopping=stopping)

    def _missing(self) -> str:
        """What keeps the services of this machine from working; empty if nothing does."""
        if self._over or self._drain_until is not None:
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
        if not self._drained >= self._doors:
            return False
        if self._membership is not None:
            return not any(g.services[0].role in ENGINE_ROLES for g in self._policy.groups)
        return INGRESS in self._drained and (self._machines is None or self._machines.drained)

    @property
    def _doors(self) -> set[ServiceId]:
        """The HTTP servers that may have a request: none that has ended has."""
        return {i for i, service in self._services.items() if i.role == "http" and service.alive}

    def _grace_s(self, role: str) -> float:
        return GRACE_S + (self._settings.drain_timeout if role == "http" else 0.0)

    def _status(self) -> Status:
        url = self._listener.url if self._listener else ""
        endpoint = self._settings.client_endpoints[0]
        others = self._machines.statuses if self._machines else []
        return Status(self._model, endpoint, url, self._statuses() + others)

    def _statuses(self) -> list[ServiceStatus]:
        return [
            self._services[service_id].status(max(0, group.restarts))
            for group in self._policy.groups
            for service_id in group.services
            if service_id in self._services
        ]


def _groups(settings: Settings, first: int) -> list[list[ServiceId]]:
    """One group of all ranks of an engine (one_for_all), and one of each other service
    (one_for_one). Numbers count from `first` on."""

    def each(role: str, count: int) -> list[list[ServiceId]]:
        return [[ServiceId(role, first + i)] for i in range(count)]

    return [
        *([] if settings.join else [[INGRESS]]),
        *[group for i in range(settings.engines) for group in _engine(settings, first + i)],
        *each("tokenizer", settings.tokenizers),
        *each("detokenizer", settings.detokenizers),
        *each("http", settings.http_servers if settings.http else 0),
    ]


def _engine(settings: Settings, engine: int) -> list[list[ServiceId]]:
    ranks = range(settings.tensor_parallel_size)
    return [
        [ServiceId("scheduler", 0, engine)],
        [ServiceId("gpu_worker", rank, engine) for rank in ranks],
    ]
