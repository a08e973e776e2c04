"""How the services of another machine join a running pipeline, see `nanovllm-launch --join`."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Set
from pathlib import Path
from typing import Any, Final

import msgspec
import zmq

from nanovllm import __version__
from nanovllm.agreement import FREE_OPTIONS, OWN_OPTIONS, fingerprint
from nanovllm.checkpoint import CheckpointError, resolve_model
from nanovllm.control import Join, Joined, Left, NotJoined, ToMachine, ToPipeline
from nanovllm.keys import PipelineKeys
from nanovllm.progress import PATIENCE_S
from nanovllm.settings import JOINING, Settings, SettingsError, flag
from nanovllm.transport.endpoints import host_and_port, is_local, parse
from nanovllm.transport.links import (
    HEARTBEAT_S,
    ConnectedLink,
    Peer,
    Received,
    Up,
    new_incarnation,
)

log = logging.getLogger(__name__)

# What ends each connection for so long has other keys: a pipeline that starts or ends does not.
TURNED_AWAY_S: Final = 5.0


class JoinedAnew(Exception):
    """The pipeline is another one than the machine has joined: its services must start anew."""


class Membership:
    """The link of a machine's supervisor to the supervisor of the pipeline.

    Attributes:
        joined: what the pipeline has said of itself.
    """

    joined: Joined

    def __init__(self, endpoint: str, keys: PipelineKeys | None) -> None:
        self._endpoint = endpoint
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        incarnation = new_incarnation()
        me = Peer("machine", incarnation, incarnation)
        curve = None if keys is None else keys.services
        self._link = ConnectedLink(self._context, endpoint, me, list[ToMachine], curve)
        self._number = 0
        self._unread: list[ToMachine] = []  # what came behind `Joined`
        self._keys = keys

    @property
    def sockets(self) -> tuple[Any, ...]:
        return self._link.sockets

    @property
    def connected(self) -> bool:
        """Whether the pipeline is there."""
        return self._link.peer is not None

    def join(self) -> None:
        """Waits for the pipeline, for as long as that takes, and joins it.

        Raises SettingsError if the pipeline refuses, or does not take the keys.
        """
        welcome_at = time.monotonic()  # when it was not turned away
        tell_at = welcome_at + PATIENCE_S
        while not hasattr(self, "joined"):
            sockets = [(socket, zmq.POLLIN) for socket in self.sockets]
            zmq.zmq_poll(sockets, int(HEARTBEAT_S * 1000))
            self._unread = self.receive()
            self._link.heartbeat()
            now = time.monotonic()
            if not self._link.turned_away:
                welcome_at = now
            elif now - welcome_at >= TURNED_AWAY_S:
                raise SettingsError(f"--join {self._endpoint}: {self._turned_away()}")
            if now >= tell_at:
                log.info("waiting for a pipeline with --services %s", self._endpoint)
                tell_at = float("inf")

    def receive(self) -> list[ToMachine]:
        """What the pipeline says; on each connection the machine joins first.

        Raises:
            SettingsError: the pipeline refuses.
            JoinedAnew: it is another pipeline than before, or has other options.
        """
        another = False
        for event in self._link.receive():
            if isinstance(event, Up):
                self._link.send([Join(__version__, socket.gethostname(), self._number)])
            elif isinstance(event, Received):
                if isinstance(event.message, NotJoined):
                    raise SettingsError(f"--join {self._endpoint}: {event.message.why}")
                if isinstance(event.message, Joined):
                    another = self._is_another(event.message)
                else:
                    self._unread.append(event.message)
        if another:
            raise JoinedAnew
        messages, self._unread = self._unread, []
        return messages

    def send(self, message: ToPipeline) -> bool:
        """Returns False if the pipeline cannot be reached."""
        return self._link.send([message])

    def heartbeat(self) -> None:
        self._link.heartbeat()

    def close(self) -> None:
        """The machine leaves the pipeline."""
        self._link.send([Left()])
        self._link.close()
        self._context.term()

    def _turned_away(self) -> str:
        if self._keys is None:
            return (
                "what listens there is no pipeline, or has keys: name the directory of its"
                " services.key with --keys"
            )
        return (
            f"what listens there does not take {self._keys.file}: it is no pipeline, has no keys,"
            " or has another services.key, which belongs here"
        )

    def _is_another(self, joined: Joined) -> bool:
        before = getattr(self, "joined", joined)
        self.joined, self._number = joined, joined.number
        return joined != before


def offer(settings: Settings, model: str, directory: Path) -> Joined:
    """What machines are told that join.

    Args:
        settings: the pipeline's.
        model: as the pipeline's command line names it.
        directory: where its files are.
    """
    if Path(model).expanduser().is_dir():
        model = str(directory)
    told = msgspec.structs.asdict(settings) | {"model": model}
    for name in OWN_OPTIONS:
        del told[name]
    return Joined(0, msgspec.json.encode(told), fingerprint(directory))


def check_to_join(own: Settings, given: Set[str]) -> None:
    """Checks a command line with --join for what is wrong with any pipeline.

    Raises SettingsError; the message says what to change.
    """
    if not any(getattr(own, name) for name in JOINING):
        raise SettingsError(f"--join: name what joins, by {', '.join(map(flag, JOINING))}")
    for name in sorted(given - OWN_OPTIONS - FREE_OPTIONS):
        raise SettingsError(f"{flag(name)}: the pipeline says this, leave it out with --join")
    try:
        socket.getaddrinfo(*host_and_port(own.join.removeprefix("tcp://")))
    except socket.gaierror as error:
        raise SettingsError(f"--join {own.join}: {error.strerror}") from None


def settings_to_join(own: Settings, given: Set[str], joined: Joined) -> tuple[Settings, Path]:
    """The settings of the services that join, and the directory of their model.

    Args:
        own: the settings of the machine's command line.
        given: the names of those that the command line says.
        joined: what the pipeline has said.

    Raises:
        SettingsError: the options do not fit the pipeline's, or the model is another one.
        CheckpointError: there is no such model.
    """
    theirs = msgspec.json.decode(joined.settings)
    mine = msgspec.to_builtins(own)
    taken = {name: mine[name] for name in (given & FREE_OPTIONS) | OWN_OPTIONS}
    here = {
        "advertise": own.advertise or _own_address(own.join),
        "ingress": _from_here(theirs["ingress"], own),
    }
    try:
        settings = msgspec.convert({**theirs, **taken, **here}, Settings)
    except msgspec.ValidationError as error:  # a SettingsError comes as one too
        raise SettingsError(str(error)) from None
    if (settings.device == "sim") != (theirs["device"] == "sim"):
        raise SettingsError(f"--device {settings.device}: the pipeline has {theirs['device']}")
    try:
        directory = resolve_model(settings.model)
    except CheckpointError as error:
        if "model" in given:
            raise
        raise SettingsError(
            f"{error}; it is the pipeline's, name MODEL where it is on this machine"
        ) from None
    if fingerprint(directory) != joined.fingerprint:
        raise SettingsError(
            f"{directory} is not the pipeline's model: config.json, tokenizer.json or the weights"
            " are others"
        )
    return settings, directory


def _own_address(endpoint: str) -> str:
    """The address of this machine on the way to `endpoint`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(parse(endpoint))  # sends nothing
        address: str = probe.getsockname()[0]
        return address


def _from_here(ingress: str, own: Settings) -> str:
    """Where clients on this machine connect.

    Raises SettingsError if HTTP servers join, and only its own machine reaches the ingress.
    """
    host = own.join.removeprefix("tcp://").rpartition(":")[0]
    for every in ("*", "0.0.0.0"):
        ingress = ingress.replace(f"tcp://{every}:", f"tcp://{host}:")
    if own.http_servers and (not ingress or (is_local(ingress) and not is_local(own.join))):
        raise SettingsError(
            f"--http-servers: only the pipeline's own machine reaches its --ingress {ingress!r}"
        )
    return ingress
