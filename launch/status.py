"""What the commands ask a running pipeline's supervisor, and what `nanovllm status` shows."""

from __future__ import annotations

import os
import time
from typing import Any, Final

import msgspec
import zmq

from nanovllm.client.errors import PipelineUnavailable
from nanovllm.control import (
    DetokenizerStats,
    Done,
    FromSupervisor,
    IngressStats,
    Restart,
    Scale,
    SchedulerStats,
    ServiceStatus,
    Stats,
    Status,
    StatusRequest,
    TokenizerStats,
    WorkerStats,
)
from nanovllm.settings import Settings
from nanovllm.transport.links import ConnectedLink, Down, Peer, Received, Up, new_incarnation
from nanovllm.wording import counted

TIMEOUT_S: Final = 3.0
# Services report once a second.
NEXT_REPORT_S: Final = 1.1


class Control:
    """A link to the supervisor of the pipeline in `runtime_dir`.

    Raises:
        SettingsError: the directory's path is too long for a socket.
        PipelineUnavailable: no pipeline runs there (from every method, too).
    """

    def __init__(self, runtime_dir: str) -> None:
        self._runtime_dir = runtime_dir
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

    def command(self, command: Scale | Restart) -> None:
        """Has something done, and returns when it was: that may take as long as loading a model.

        Raises:
            ValueError: the supervisor refuses, and says why.
        """
        answer = self._ask(command)
        if isinstance(answer, Done) and answer.error is not None:
            raise ValueError(answer.error)

    def _ask(self, question: StatusRequest | Scale | Restart) -> FromSupervisor:
        """The answer. Of commands it comes when they are done; for that it is waited while the
        supervisor is there."""
        deadline = time.monotonic() + TIMEOUT_S
        asked = self._link.send([question])
        poller = zmq.Poller()
        for socket in self._link.sockets:
            poller.register(socket, zmq.POLLIN)
        while True:
            patient = asked and not isinstance(question, StatusRequest)
            left = deadline - time.monotonic()
            if left <= 0 and not patient:
                raise self._nothing_runs()
            poller.poll(None if patient else int(left * 1000) + 1)
            for event in self._link.receive():
                if isinstance(event, Up) and not asked:
                    asked = self._link.send([question])
                elif isinstance(event, Down) and patient:
                    raise PipelineUnavailable("the pipeline ended before it was done")
                elif isinstance(event, Received):
                    answer: FromSupervisor = event.message
                    return answer

    def two_reports(self) -> tuple[Status, Status]:
        """The status twice, a second apart, so that there are rates to show."""
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


def to_json(status: Status) -> str:
    """The status as JSON objects, with fields named as in `messages`."""
    return msgspec.json.encode(_as_dict(status)).decode()


def render(before: Status, now: Status) -> str:
    """A table of the services, and the state of the engine.

    Args:
        before: an earlier status; rates are taken between the two.
        now: the status that is shown.
    """
    earlier = {(s.role, s.index): s for s in before.services}
    rows = [("SERVICE", "PID", "STATE", "UPTIME", "RESTARTS", "CPU", "WORK")]
    for service in now.services:
        then = earlier.get((service.role, service.index))
        rows.append(
            (
                f"{service.role} {service.index}",
                str(service.pid),
                service.state,
                _duration(service.uptime_s),
                str(service.restarts),
                _percent(service.cpu_s, then.cpu_s if then else 0.0, service, then),
                _work(service.stats),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    head = f"{now.model} at {now.endpoint}"
    return "\n".join([head, "", *table, *_engine(now, earlier)])


def _engine(now: Status, earlier: dict[tuple[str, int], ServiceStatus]) -> list[str]:
    lines: list[str] = []
    for service in now.services:
        stats = service.stats
        then = earlier.get((service.role, service.index))
        if isinstance(stats, SchedulerStats):
            hits = f"{stats.cached_tokens / max(1, stats.prompt_tokens):.0%}"
            lines += [
                "",
                f"sequences     {stats.running} running, {stats.waiting} waiting,"
                f" {counted(stats.records, 'record')}",
                f"KV blocks     {stats.blocks_used} of {stats.blocks_total} used",
                f"prefix cache  {hits} of {counted(stats.prompt_tokens, 'prompt token')}"
                " came from it",
                f"output        {counted(stats.generated, 'token')} in"
                f" {counted(stats.steps, 'step')}, {counted(stats.preemptions, 'preemption')}",
            ]
        elif isinstance(stats, WorkerStats) and service.index == 0:
            was = then.stats.busy_s if then and isinstance(then.stats, WorkerStats) else 0.0
            lines.append(f"device busy   {_percent(stats.busy_s, was, service, then)}")
    return lines


def _work(stats: Stats | None) -> str:
    if isinstance(stats, IngressStats):
        clients = counted(stats.sessions, "client")
        return f"{clients}, {stats.requests} unfinished, {stats.finished} finished"
    if isinstance(stats, TokenizerStats):
        return f"{stats.queued} queued, {stats.tokenized} tokenized"
    if isinstance(stats, SchedulerStats):
        return f"{stats.running} running, {stats.waiting} waiting"
    if isinstance(stats, WorkerStats):
        return f"{counted(stats.slots_used, 'slot')} used, {counted(stats.steps, 'step')}"
    if isinstance(stats, DetokenizerStats):
        return f"{counted(stats.requests, 'request')}, {counted(stats.tokens, 'token')}"
    return ""


def _percent(now: float, then: float, service: ServiceStatus, before: ServiceStatus | None) -> str:
    """The share of the time between two reports of one life of a service."""
    if service.stats is None or before is None or before.pid != service.pid:
        return "-"
    seconds = service.at_s - before.at_s
    return f"{(now - then) / seconds:.0%}" if seconds > 0 and before.stats is not None else "-"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _as_dict(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        return {name: _as_dict(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, list):
        return [_as_dict(item) for item in value]
    return value
