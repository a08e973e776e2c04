"""`Control`: asks the supervisor of a running pipeline."""

from __future__ import annotations

import itertools
import os
import socket
import time
from typing import Final, TypeVar

import msgspec
import zmq

from nanovllm.client.results import PipelineUnavailable
from nanovllm.control import (
    Done,
    FromSupervisor,
    Health,
    HealthRequest,
    Restart,
    Scale,
    Status,
    StatusRequest,
)
from nanovllm.settings import Settings
from nanovllm.transport.links import ConnectedLink, Down, Peer, Received, Up, new_incarnation

TIMEOUT_S: Final = 3.0
# On a busy machine a connection may end, and is made anew soon.
BACK_S: Final = 10.0
# After so long there is a next report: services report once a second.
NEXT_REPORT_S: Final = 1.1

A = TypeVar("A", Status, Health)


class Control:
    """A link to the supervisor of the pipeline in `runtime_dir`.

    Raises:
        SettingsError: the directory's path is too long for a socket.
        PipelineUnavailable: no pipeline runs there, or it does not answer. Every method may raise
            this too.
    """

    def __init__(self, runtime_dir: str) -> None:
        self._runtime_dir = runtime_dir
        self.asked = False  # whether the supervisor has the latest question
        endpoint = Settings(runtime_dir=runtime_dir).control_endpoint
        self._path = endpoint.removeprefix("ipc://")
        if not os.path.exists(self._path):
            raise self._unavailable()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._numbers = itertools.count(1)
        me = Peer("command", os.getpid(), new_incarnation())
        self._link: ConnectedLink[FromSupervisor] = ConnectedLink(
            self._context, endpoint, me, list[FromSupervisor]
        )
        self._poller = zmq.Poller()
        for each in self._link.sockets:
            self._poller.register(each, zmq.POLLIN)

    def status(self) -> Status:
        return self._answer(StatusRequest(), Status)

    def missing(self) -> str:
        """What keeps the services of this machine from working; empty if nothing does."""
        return self._answer(HealthRequest(), Health).missing

    def command(self, command: Scale | Restart) -> None:
        """Returns when the command is done, which may take as long as loading a model.

        If the connection ends meanwhile, it is waited for, and the supervisor asked again, which
        does the command once.

        Raises:
            ValueError: the supervisor refuses; the message says why.
        """
        command = msgspec.structs.replace(command, number=next(self._numbers))
        deadline = time.monotonic() + TIMEOUT_S
        asked = self._link.peer if self._send(command) else None
        while True:
            patient = self._link.peer is not None and self.asked
            left = deadline - time.monotonic()
            if left <= 0 and not patient:
                raise self._unavailable() if asked is None else self._ended()
            self._poller.poll(None if patient else max(0, int(left * 1000)) + 1)
            for event in self._link.receive():
                if isinstance(event, Down):
                    deadline = time.monotonic() + BACK_S
                elif isinstance(event, Up):
                    if asked not in (None, event.peer):
                        raise self._ended()
                    if self._send(command):
                        asked = event.peer
                elif isinstance(event.message, Done) and event.message.number == command.number:
                    if event.message.error is not None:
                        raise ValueError(event.message.error)
                    return

    def two_reports(self) -> tuple[Status, Status]:
        """The status twice, a second apart: the difference gives rates."""
        before = self.status()
        time.sleep(NEXT_REPORT_S)
        return before, self.status()

    def close(self) -> None:
        self._link.close()
        self._context.term()

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, question: StatusRequest | HealthRequest, kind: type[A]) -> A:
        """The answer of this kind, which comes at once."""
        deadline = time.monotonic() + TIMEOUT_S
        self._send(question)
        while (left := deadline - time.monotonic()) > 0:
            self._poller.poll(int(left * 1000) + 1)
            for event in self._link.receive():
                if isinstance(event, Up) and not self.asked:
                    self._send(question)
                elif isinstance(event, Received) and isinstance(event.message, kind):
                    return event.message
        raise self._unavailable()

    def _send(self, question: StatusRequest | HealthRequest | Scale | Restart) -> bool:
        self.asked = True  # Ctrl-C may come between the sending and its result
        self.asked = self._link.send([question])
        return self.asked

    def _ended(self) -> PipelineUnavailable:
        return PipelineUnavailable("the pipeline ended before it was done")

    def _unavailable(self) -> PipelineUnavailable:
        if _is_bound(self._path):
            return PipelineUnavailable(
                f"the launcher of the pipeline in {self._runtime_dir} does not answer: it is"
                " stopped, or the machine is very busy"
            )
        return PipelineUnavailable(
            f"no pipeline runs in {self._runtime_dir}; start one with `nanovllm-launch`,"
            " or name another with --runtime-dir"
        )


def _is_bound(path: str) -> bool:
    """Whether a process, which may be stopped, has bound the socket at `path`."""
    with socket.socket(socket.AF_UNIX) as tried:
        tried.setblocking(False)
        try:
            tried.connect(path)
        except BlockingIOError:  # more wait for an answer than it has room for
            return True
        except OSError:
            return False
    return True
