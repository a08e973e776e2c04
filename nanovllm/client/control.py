"""`Control`: asks the supervisor of a running pipeline."""

from __future__ import annotations

import os
import time
from typing import Final

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
# After so long there is a next report: services report once a second.
NEXT_REPORT_S: Final = 1.1

_Question = StatusRequest | HealthRequest | Scale | Restart


class Control:
    """A link to the supervisor of the pipeline in `runtime_dir`.

    Raises:
        SettingsError: the directory's path is too long for a socket.
        PipelineUnavailable: no pipeline runs there. Every method may raise this too.
    """

    def __init__(self, runtime_dir: str) -> None:
        self._runtime_dir = runtime_dir
        self.asked = False  # whether the supervisor has the latest question
        endpoint = Settings(runtime_dir=runtime_dir).control_endpoint
        if not os.path.exists(endpoint.removeprefix("ipc://")):
            raise self._nothing_runs()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        me = Peer("command", os.getpid(), new_incarnation())
        self._link: ConnectedLink[FromSupervisor] = ConnectedLink(
            self._context, endpoint, me, list[FromSupervisor]
        )

    def status(self) -> Status:
        answer = self._ask(StatusRequest())
        if not isinstance(answer, Status):
            raise PipelineUnavailable(f"the supervisor answered with {answer}")
        return answer

    def missing(self) -> str:
        """What keeps the services of this machine from working; empty if nothing does."""
        answer = self._ask(HealthRequest())
        if not isinstance(answer, Health):
            raise PipelineUnavailable(f"the supervisor answered with {answer}")
        return answer.missing

    def command(self, command: Scale | Restart) -> None:
        """Returns when the command is done, which may take as long as loading a model.

        Raises:
            ValueError: the supervisor refuses; the message says why.
        """
        answer = self._ask(command)
        if isinstance(answer, Done) and answer.error is not None:
            raise ValueError(answer.error)

    def _ask(self, question: _Question) -> FromSupervisor:
        """The answer. A status comes within `TIMEOUT_S`; the answer to a command comes when the
        command is done, so wait for it as long as the supervisor is connected."""
        deadline = time.monotonic() + TIMEOUT_S
        self._send(question)
        poller = zmq.Poller()
        for socket in self._link.sockets:
            poller.register(socket, zmq.POLLIN)
        while True:
            patient = self.asked and isinstance(question, Scale | Restart)
            left = deadline - time.monotonic()
            if left <= 0 and not patient:
                raise self._nothing_runs()
            poller.poll(None if patient else int(left * 1000) + 1)
            for event in self._link.receive():
                if isinstance(event, Up) and not self.asked:
                    self._send(question)
                elif isinstance(event, Down) and patient:
                    raise PipelineUnavailable("the pipeline ended before it was done")
                elif isinstance(event, Received):
                    answer: FromSupervisor = event.message
                    return answer

    def _send(self, question: _Question) -> None:
        self.asked = True  # Ctrl-C may come between the sending and its result
        self.asked = self._link.send([question])

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

    def _nothing_runs(self) -> PipelineUnavailable:
        return PipelineUnavailable(
            f"no pipeline runs in {self._runtime_dir}; start one with `nanovllm-launch`,"
            " or name another with --runtime-dir"
        )
