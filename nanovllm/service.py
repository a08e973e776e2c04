"""What every service process has: options, an identity, a link to the supervisor, and a loop.

A service is a core and the loop that feeds the core. A service keeps nothing that other services
cannot rebuild, so it needs no clean-up: it exits on SIGTERM, when its lifeline breaks, or on an
exception, which is logged.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
import msgspec
import zmq

from nanovllm.agreement import agreement
from nanovllm.checkpoint import CheckpointError, ModelConfig, resolve_model
from nanovllm.control import (
    Drained,
    FromSupervisor,
    KillService,
    Loading,
    LoadingStage,
    Ready,
    Report,
    Stats,
    StatusRequest,
    Vacated,
)
from nanovllm.exit_codes import EXIT_MISCONFIGURED
from nanovllm.keys import PipelineKeys
from nanovllm.log import log_to_stderr
from nanovllm.names import ServiceId
from nanovllm.options import settings_from, settings_options
from nanovllm.output import lossy
from nanovllm.quietly import OFF_STEP_PATH_NICENESS
from nanovllm.settings import Settings, SettingsError
from nanovllm.transport.curve import Gate, is_tcp
from nanovllm.transport.endpoints import EndpointUnusable
from nanovllm.transport.links import (
    HEARTBEAT_S,
    BoundLink,
    ConnectedLink,
    Event,
    Link,
    Peer,
    Received,
    new_incarnation,
)

log = logging.getLogger(__name__)

M = TypeVar("M")

# Begins the critical event that tells why.
REASON_PREFIX = "cannot start: "
# How soon a service tries again to send messages that a peer did not take.
RETRY_S = 0.01
TURN_S = 0.02
GREETING_S = 2.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LIFELINE_VARIABLE = "NANOVLLM_LIFELINE_FD"
# What HTTP servers alone inherit: the socket that listens, and the token of their pages.
LISTENER_VARIABLE = "NANOVLLM_HTTP_FD"
PAGE_TOKEN_VARIABLE = "NANOVLLM_PAGE_TOKEN"


class Service:
    """One service process."""

    def __init__(self, service: ServiceId, settings: Settings) -> None:
        self.directory: Path = resolve_model(settings.model)
        self.config = ModelConfig.from_checkpoint(self.directory, settings.quantization)
        self.settings = settled(settings, self.directory, self.config)
        self._agreement = agreement(self.settings, self.directory)
        self.me = Peer.of(service, new_incarnation())
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.keys = PipelineKeys(settings.keys) if settings.keys else None
        self._gate: Gate | None = None
        self._stats: Callable[[], Stats] | None = None
        self._links: list[Link] = []
        # Socket: its link, and the handler of the link's events.
        self._handlers: dict[Any, tuple[Link, Callable[[Event[Any]], None]]] = {}
        self._watchers: list[Callable[[], None]] = []
        self._poller = zmq.Poller()
        self._next_beat = 0.0
        self._standing: Loading | Ready | Drained | None = None
        self._on_told: Callable[[FromSupervisor], None] | None = None
        self._control = self.connect(
            self.settings.control_endpoint, list[FromSupervisor], self._on_control
        )

    def connect(
        self, endpoint: str, inbound: type[list[M]], handler: Callable[[Event[M]], None]
    ) -> ConnectedLink[M]:
        """Opens a link to a service that binds; `handler` is called with its events."""
        curve = None if self.keys is None else self.keys.services
        link = ConnectedLink(self.context, endpoint, self.me, inbound, curve, self._agreement)
        self._add(link, handler)
        return link

    def bind(
        self, endpoint: str, inbound: type[list[M]], handler: Callable[[Event[M]], None]
    ) -> BoundLink[M]:
        """Opens a link that others connect to; `handler` is called with its events.

        Raises:
            EndpointTaken, EndpointUnusable: see `endpoints.bind`.
        """
        self.open_gate(endpoint)
        curve = None if self.keys is None else self.keys.services
        link = BoundLink(self.context, endpoint, self.me, inbound, curve, self._agreement)
        self._add(link, handler)
        return link

    def bind_beyond(self, link: BoundLink[Any], endpoint: str) -> str:
        """Binds one more endpoint of a link, for other machines; see `Router.bind`."""
        self.open_gate(endpoint)
        return link.bind(endpoint)

    def open_gate(self, *endpoints: str) -> None:
        """To be called before a socket binds these endpoints: from now on, keys open it."""
        if self.keys is not None and self._gate is None and any(map(is_tcp, endpoints)):
            self._gate = Gate(self.context, self.keys.trusted)

    def disconnect(self, link: Link) -> None:
        """Closes a link for good."""
        self._links.remove(link)
        for socket in link.sockets:
            self._poller.unregister(socket)
            del self._handlers[socket]
        link.close()

    def watch(self, readable: int | zmq.Socket[bytes], handler: Callable[[], None]) -> None:
        """Wakes up when a descriptor or socket is readable, and calls `handler` at every wake-up;
        the handler must not block."""
        self._poller.register(readable, zmq.POLLIN)
        self._watchers.append(handler)

    def greet(self) -> None:
        """Waits until the supervisor knows this service, but not for long: there may be none.

        Called before what may hold the interpreter for minutes: no hello is said meanwhile.
        """
        deadline = time.monotonic() + GREETING_S
        while self._control.peer is None and (left := deadline - time.monotonic()) > 0:
            sockets = [(socket, zmq.POLLIN) for socket in self._control.sockets]
            zmq.zmq_poll(sockets, int(left * 1000) + 1)
            for event in self._control.receive():
                self._on_control(event)

    def loading(self, stage: LoadingStage, done: int, total: int) -> None:
        """Tells the supervisor that `done` of `total` are loaded; may be called before `run`, from
        the same thread."""
        self._announce(Loading(stage, done, total))

    def ready(self, detail: str = "") -> None:
        """Tells the supervisor that the service can work: what is imported and loaded stays, and no
        garbage collection looks at it from now on."""
        gc.freeze()
        log.info("ready%s", f": {detail}" if detail else "")
        self._announce(Ready(detail))

    def on_told(self, handler: Callable[[FromSupervisor], None]) -> None:
        """From now on, `handler` is called with the supervisor's messages."""
        self._on_told = handler

    def drained(self) -> None:
        """Tells the supervisor, once, that no request is left."""
        if not isinstance(self._standing, Drained):
            self._announce(Drained())

    def vacated(self, engine: int) -> None:
        """Tells the supervisor that this engine's requests are moved."""
        self._control.send([Vacated(engine)])

    def run(self, step: Callable[[float], float | None], stats: Callable[[], Stats]) -> NoReturn:
        """Polls for ever: hands events to their handlers, then calls `step`.

        Args:
            step: called with the time (`time.monotonic`) after each wake-up; does the core's work
                and sends its messages. Returns in how many seconds to call it again even if nothing
                happens, or None.
            stats: called once a second; its result is reported to the supervisor.
        """
        self._stats = stats
        wait: float | None = 0.0
        while True:
            until_beat = max(0.0, self._next_beat - time.monotonic())
            timeout = until_beat if wait is None else min(wait, until_beat)
            self._dispatch(self._poller.poll(int(timeout * 1000 + 0.999)))
            wait = step(time.monotonic())
            self._beat()

    def turn(self, stats: Callable[[], Stats]) -> None:
        """Does what `run` does at each wake-up, without waiting: for a service that has an event
        loop, and calls this every TURN_S."""
        self._stats = stats
        self._dispatch(self._poller.poll(0))
        self._beat()

    def ask_status(self) -> bool:
        """Asks the supervisor for the `Status`, which comes to the handler of `on_told`. Returns
        False if the supervisor cannot be asked now."""
        return self._control.send([StatusRequest()])

    def ask_kill(self, service: ServiceId) -> bool:
        """Asks the supervisor to kill a service; see `KillService`. Returns False if the supervisor
        cannot be asked now."""
        return self._control.send([KillService(service)])

    def close(self) -> None:
        for link in self._links:
            link.close()
        if self._gate is not None:
            self._gate.close()
        self.context.term()

    def _add(self, link: Link, handler: Callable[[Event[Any]], None]) -> None:
        self._links.append(link)
        for socket in link.sockets:
            self._poller.register(socket, zmq.POLLIN)
            self._handlers[socket] = link, handler

    def _dispatch(self, readable: list[tuple[Any, int]]) -> None:
        for socket, _ in readable:
            if socket in self._handlers:
                link, handler = self._handlers[socket]
                for event in link.receive():
                    handler(event)
        for watcher in self._watchers:
            watcher()

    def _beat(self) -> None:
        now = time.monotonic()
        if now < self._next_beat:
            return
        self._next_beat = now + HEARTBEAT_S
        sys.stderr.flush()  # which says what was lost
        for link in self._links:
            link.heartbeat()
        if self._stats is not None:
            self._control.send([Report(now, time.process_time(), self._stats())])

    def _announce(self, standing: Loading | Ready | Drained) -> None:
        self._standing = standing
        for event in self._control.receive():
            self._on_control(event)
        self._control.send([standing])

    def _on_control(self, event: Event[FromSupervisor]) -> None:
        if isinstance(event, Received):
            if self._on_told is not None:
                self._on_told(event.message)
            self._next_beat = 0.0  # report at once what the message has changed
        elif self._standing is not None:
            self._control.send([self._standing])


def settled(settings: Settings, directory: Path, config: ModelConfig) -> Settings:
    """The settings with `model` resolved to `directory`, and `max_model_len` cut to the model's,
    which is logged."""
    longest = min(settings.max_model_len, config.context_length)
    if longest < settings.max_model_len:
        log.warning(
            "--max-model-len %d is cut to %d: the model has no more positions (%s)",
            settings.max_model_len,
            longest,
            directory / "config.json",
        )
    return msgspec.structs.replace(
        settings,
        model=str(directory),
        max_model_len=longest,
    )


def service_command(
    role: str, serve: Callable[[Service], NoReturn], *, on_step_path: bool = False
) -> click.Command:
    """The command line of a service: `python -m nanovllm.services.ROLE`.

    Args:
        role: the service's name.
        serve: makes the core and its links, and runs.
        on_step_path: whether the device waits for this service. The other services yield the CPU
            to those on the step path.
    """

    @click.command(help=f"Runs one {role} on its own. The launcher does this for you.")
    @click.option("--index", type=int, default=0, help="Which of its kind (the rank of a worker).")
    @click.option("--engine", type=int, default=0, help="Which engine it belongs to.")
    @settings_options()
    def command(index: int, engine: int, **options: Any) -> None:
        service_id = ServiceId(role, index, engine)
        settings = settings_from(options)
        # A pipe to the supervisor, which may be stopped.
        sys.stdout, sys.stderr = lossy(sys.stdout), lossy(sys.stderr)
        log_format = "json" if LIFELINE_VARIABLE in os.environ else settings.log_format
        log_to_stderr(str(service_id), log_format, settings.log_level)
        _end_with_the_launcher()
        _allow_connections()
        if not on_step_path:
            os.nice(OFF_STEP_PATH_NICENESS)
        try:
            serve(Service(service_id, settings))
        except (CheckpointError, SettingsError, EndpointUnusable) as error:
            log.critical("%s%s", REASON_PREFIX, error)
            sys.exit(EXIT_MISCONFIGURED)

    return command


def _end_with_the_launcher() -> None:
    """Ignores the terminal's Ctrl-C (the launcher decides); ends on SIGTERM or with the launcher.

    The lifeline is a pipe whose other end the launcher holds: the pipe breaks when the launcher
    ends, for whatever reason. A stopped process (SIGSTOP) cannot see that, so the kernel is asked
    to kill this process too; the pipe covers a launcher that ended before the kernel was asked.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    descriptor = os.environ.get(LIFELINE_VARIABLE)
    if descriptor is not None:
        _ask_for_a_kill_with_the_parent()
        watch_lifeline(int(descriptor))


def _allow_connections() -> None:
    """Lets this process have as many descriptors as the system allows. A peer without a key holds
    one until its handshake has failed, and ZeroMQ accepts nobody while there is none left."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _ask_for_a_kill_with_the_parent() -> None:
    """Asks the kernel for a SIGKILL when the thread that started this process ends: the launcher's
    main thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def watch_lifeline(descriptor: int) -> None:
    """Ends this process at once when the other end of the pipe `descriptor` is closed."""

    def wait_for_the_end() -> None:
        while os.read(descriptor, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait_for_the_end, name="lifeline", daemon=True).start()
