"""What services and commands say to the supervisor, and it to them: see `messages` for the form."""

from __future__ import annotations

from typing import Literal

from nanovllm.messages import Message

LoadingStage = Literal["loading weights", "measuring memory", "capturing graphs"]


class Loading(Message, tag="loading"):
    """Progress towards being ready: `done` of `total` bytes of weights; of steps and graphs that
    are tried, to know what memory they take; or of graphs."""

    stage: LoadingStage
    done: int
    total: int


class Ready(Message, tag="ready"):
    """The service can work. `detail` is a few words for the log, or empty."""

    detail: str


class IngressStats(Message, tag="ingress"):
    sessions: int
    requests: int
    finished: int


class TokenizerStats(Message, tag="tokenizer"):
    queued: int
    tokenized: int


class SchedulerStats(Message, tag="scheduler"):
    """`records` counts every request known, the finished that await their `End` among them;
    `plan_bytes` is the size of the latest step plan."""

    running: int
    waiting: int
    records: int
    blocks_used: int
    blocks_total: int
    prompt_tokens: int
    cached_tokens: int
    steps: int
    generated: int
    preemptions: int
    plan_bytes: int


class WorkerStats(Message, tag="gpu_worker"):
    """`in_flight` are the steps launched that have not ended."""

    slots_used: int
    in_flight: int
    steps: int
    busy_s: float


class DetokenizerStats(Message, tag="detokenizer"):
    requests: int
    tokens: int


Stats = IngressStats | TokenizerStats | SchedulerStats | WorkerStats | DetokenizerStats


class Report(Message, tag="report"):
    """Once a second from each service: CPU seconds used since its start, and its counts.

    `at_s` is the machine's monotonic clock when it was made, so that two give rates.
    """

    at_s: float
    cpu_s: float
    stats: Stats


class StatusRequest(Message, tag="status_request"):
    """A command asks for `Status`."""


class Scale(Message, tag="scale"):
    """A command asks for `count` services of this role; answered with `Done`."""

    role: str
    count: int


class Restart(Message, tag="restart"):
    """A command asks that the services of this role, or `all`, are restarted one after the other;
    answered with `Done`."""

    role: str


class Done(Message, tag="done"):
    """What the command asked for is so; or `error` tells why it will not be."""

    error: str | None


class Drain(Message, tag="drain"):
    """To the ingress: in `resume_s` seconds, take no new requests, and say `Drained` once none is
    left. Until then clients may resume what they had in an earlier life of the ingress."""

    resume_s: float


class Crashed(Message, tag="crashed"):
    """To the ingress: this life of a service (of a worker group, by its rank 0) ended for a reason
    of its own, and not by a kill from outside."""

    role: str
    index: int
    incarnation: int


class Drained(Message, tag="drained"):
    """The ingress has no unfinished request, and takes no new one."""


class ServiceStatus(Message):
    """`loading` is how far it is, while it loads; `at_s`, `cpu_s` and `stats` are those of its last
    report, `stats` None before the first. `uptime_s` counts from its latest start, `restarts` how
    often it was started again."""

    role: str
    index: int
    pid: int
    state: Literal["starting", "loading", "ready", "ended"]
    loading: Loading | None
    uptime_s: float
    restarts: int
    at_s: float
    cpu_s: float
    stats: Stats | None


class Status(Message, tag="status"):
    model: str
    endpoint: str
    services: list[ServiceStatus]


ToSupervisor = Loading | Ready | Report | Drained | StatusRequest | Scale | Restart
FromSupervisor = Status | Done | Drain | Crashed
