"""What commands ask of a supervisor: to scale or restart services."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nanovllm.control import Done, Restart, Scale
from nanovllm.launch.gpus import Gpus
from nanovllm.launch.layout import engine_groups
from nanovllm.launch.machines import Machines
from nanovllm.launch.policy import Policy
from nanovllm.names import ServiceId
from nanovllm.settings import MAX_SERVICES, RESTARTABLE, SCALABLE, Settings, SettingsError
from nanovllm.transport.links import Peer

# Who asks for what the pipeline's supervisor has a machine do.
PIPELINE: Final = Peer("pipeline", 0, 0)
# So many commands are remembered after their end.
REMEMBERED: Final = 100


@dataclass
class _Asked:
    command: Scale | Restart
    done: Done | None = None


class Commands:
    """Checks commands, and has the policy and other machines do them.

    Each is done once, however often it is asked for: the connection of who asks may end with the
    answer on its way.

    Args:
        settings: of the services here.
        first: the number of the first service of each role.
        gpus: which engines take.
        policy: of the services here.
        machines: those that join the pipeline; None if none can.
        joined: whether the services here have joined a pipeline.
        serves_http: whether HTTP servers can be started here.
        answer: tells who asked.
    """

    def __init__(
        self,
        settings: Settings,
        first: int,
        gpus: Gpus,
        policy: Policy,
        machines: Machines | None,
        joined: bool,
        serves_http: bool,
        answer: Callable[[Peer, Done], None],
    ) -> None:
        self._settings = settings
        self._first = first
        self._gpus = gpus
        self._policy = policy
        self._machines = machines
        self._joined = joined
        self._serves_http = serves_http
        self._answer = answer
        self._asked: dict[Peer, _Asked] = {}  # the latest command of each

    def ask(self, asker: Peer, command: Scale | Restart, now: float) -> None:
        """A command has come, for the first time or again."""
        asked = self._asked.get(asker)
        if asked is not None and asked.command == command and asker != PIPELINE:
            if asked.done is not None:
                self._answer(asker, asked.done)
            return
        self._asked.pop(asker, None)  # the latest is the last
        self._asked[asker] = _Asked(command)
        ended = [peer for peer, other in self._asked.items() if other.done is not None]
        for peer in ended[:-REMEMBERED]:
            del self._asked[peer]
        if (why := self._refusal(asker, command)) is not None:
            self.done(asker, why)
        elif isinstance(command, Restart):
            self._policy.restart(command.role, asker)
        elif command.machine and self._machines is not None:
            self._machines.command(asker, command)
        else:
            self._scale(command, asker, now)

    def done_here(self, asker: Peer) -> None:
        """The services here have done it. A restart goes on on the machines that have joined."""
        asked = self._asked.get(asker)
        if asked is not None and self._machines is not None and isinstance(asked.command, Restart):
            self._machines.command(asker, asked.command)
        else:
            self.done(asker)

    def done(self, asker: Peer, error: str | None = None) -> None:
        """It is done, or cannot be."""
        if (asked := self._asked.get(asker)) is not None:
            asked.done = Done(error, asked.command.number)
            self._answer(asker, asked.done)

    def close(self) -> None:
        """The pipeline ends."""
        for asker, asked in self._asked.items():
            if asked.done is None:
                self.done(asker, "the pipeline ended before it was done")

    def _refusal(self, asker: Peer, command: Scale | Restart) -> str | None:
        """Why this cannot be done, if it cannot."""
        role = command.role
        if isinstance(command, Scale) and command.machine and self._machines is not None:
            return None
        if isinstance(command, Scale) and command.machine and asker != PIPELINE:
            why = (
                "only the main machine reaches others; those here are scaled without it"
                if self._joined
                else "no machine has joined"
            )
            return f"--machine {command.machine}: {why}"
        alone = self._machines is None and not self._joined
        if role == "http" and not self._serves_http and (alone or isinstance(command, Scale)):
            what = "pipeline" if alone else "machine"
            return f"this {what} serves no HTTP: launch it with --http HOST:PORT"
        if isinstance(command, Restart):
            known = role in RESTARTABLE
            return None if known else f"there is no {role!r}; there are {', '.join(RESTARTABLE)}"
        fewest = 1 if alone else 0
        if role in SCALABLE and fewest <= command.count <= MAX_SERVICES:
            return None
        return f"only {', '.join(SCALABLE)} can be scaled, to {fewest} to {MAX_SERVICES}"

    def _scale(self, command: Scale, asker: Peer, now: float) -> None:
        role = command.role

        def services(number: int) -> list[list[ServiceId]]:
            if role == "engine":
                return engine_groups(self._settings, number)
            return [[ServiceId(role, number)]]

        if role == "engine":
            try:
                self._gpus.scale(command.count)
            except SettingsError as error:
                self.done(asker, str(error))
                return
        self._policy.scale(role, command.count, services, asker, now)
