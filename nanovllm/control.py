"""The messages between the supervisor, the services and the commands; `messages` says how."""

from __future__ import annotations

from typing import Literal

from nanovllm.messages import Message
from nanovllm.names import ServiceId

LoadingStage = Literal["loading weights", "measuring memory", "capturing graphs"]


class Loading(Message, tag="loading"):
    """Progress of a start. `done` and `total` count bytes of weights; or the steps and graphs that
    are tried to measure their memory; or graphs captured."""

    stage: LoadingStage
    done: int
    total: int


class Ready(Message, tag="ready"):
    """The service can work."""

    detail: str  # a few words for the log, or empty


class IngressStats(Message, tag="ingress"):
    sessions: int
    requests: int
    finished: int


class TokenizerStats(Message, tag="tokenizer"):
    queued: int
    tokenized: int


class SchedulerStats(Message, tag="scheduler"):
    running: int
    waiting: int
    records: int  # running, waiting, and finished requests whose `End` has not come yet
    blocks_used: int
    blocks_total: int
    prompt_tokens: int
    cached_tokens: int
    steps: int
    generated: int
    preemptions: int
    plan_bytes: int  # size of the latest step plan


class WorkerStats(Message, tag="gpu_worker"):
    slots_used: int
    in_flight: int  # steps launched and not ended
    steps: int
    busy_s: float


class DetokenizerStats(Message, tag="detokenizer"):
    requests: int
    tokens: int


class Histogram(Message):
    """Durations: how many fell into each bucket, the last of which has no upper bound, and their
    sum in seconds. nanovllm/services/http/metrics.py has the bounds."""

    counts: list[int]
    sum_s: float


class HttpStats(Message, tag="http"):
    """`finished` counts requests by finish reason, and by error code."""

    running: int
    finished: dict[str, int]
    first_token: Histogram
    between_tokens: Histogram
    whole: Histogram


Stats = IngressStats | TokenizerStats | SchedulerStats | WorkerStats | DetokenizerStats | HttpStats


class Report(Message, tag="report"):
    """Each service reports once a second; two reports give rates."""

    at_s: float  # when, by the machine's monotonic clock
    cpu_s: float  # CPU time since the process started
    stats: Stats


class StatusRequest(Message, tag="status_request"):
    """A command, or an HTTP server, asks for the `Status`."""


class HealthRequest(Message, tag="health_request"):
    """A command asks for the `Health` of the services of this machine."""


class Health(Message, tag="health"):
    """`missing` tells people what keeps the services from working; empty if nothing does."""

    missing: str


class Scale(Message, tag="scale"):
    """A command asks to run `count` services of this role; the answer is `Done`, of this `number`.
    Asked again with the same number, it is done once."""

    role: str  # or "engine"
    count: int
    machine: str = ""  # one that has joined, by its name; empty: the first one
    number: int = 0


class Restart(Message, tag="restart"):
    """A command asks to restart services, one after the other; the answer is `Done`, as of
    `Scale`."""

    role: str  # or "engine", or "all"
    number: int = 0


class KillService(Message, tag="kill_service"):
    """An HTTP server asks to kill a service by SIGKILL, as anyone could from a shell; the service
    starts again. There is no answer: the status shows the death. A service that is not ready is
    left alone, so that no series of kills makes the supervisor give the service up."""

    service: ServiceId


class Done(Message, tag="done"):
    """A command is done, or refused."""

    error: str | None  # why it is refused
    number: int = 0  # which command


class Drain(Message, tag="drain"):
    """To the ingress and the HTTP servers: take no new requests, and say `Drained` once none is
    left. The ingress does so after `resume_s` seconds: until then, clients may resume their
    requests to an earlier incarnation of the ingress."""

    resume_s: float


class Vacate(Message, tag="vacate"):
    """To the ingress: the engine is about to be stopped; until it has started again it is given no
    request, and other engines get its requests. With `leaves` it will not start again."""

    engine: int
    leaves: bool


class Forget(Message, tag="forget"):
    """To the ingress: the engine's machine is given up. An engine that is connected goes on, and
    has left for good when its connection ends."""

    engine: int


class Vacated(Message, tag="vacated"):
    """From the ingress: no other engine can take more of this engine's requests."""

    engine: int


class Crashed(Message, tag="crashed"):
    """To the ingress: this incarnation of a service ended by itself, and was not killed from
    outside. Rank 0 stands for its whole group."""

    service: ServiceId
    incarnation: int


class Drained(Message, tag="drained"):
    """From the ingress and the HTTP servers: no request is unfinished, and no new one is taken."""


ServiceState = Literal["starting", "loading", "ready", "ended", "unreachable"]


class ServiceStatus(Message):
    """`at_s`, `cpu_s` and `stats` are the latest `Report`'s; `stats` is None before the first.
    `detail` is what the service said of itself when it was ready: of a worker, its device."""

    role: str
    index: int
    engine: int
    pid: int
    state: ServiceState
    loading: Loading | None  # while the service loads
    uptime_s: float  # since the latest start
    restarts: int
    at_s: float
    cpu_s: float
    stats: Stats | None
    detail: str = ""
    machine: str = ""  # the name of a machine that has joined; empty on the first one

    @property
    def service(self) -> ServiceId:
        return ServiceId(self.role, self.index, self.engine)


class Status(Message, tag="status"):
    model: str
    endpoint: str
    http: str  # the URL of the HTTP servers; empty if there are none
    services: list[ServiceStatus]


ToSupervisor = (
    Loading
    | Ready
    | Report
    | Drained
    | Vacated
    | StatusRequest
    | HealthRequest
    | Scale
    | Restart
    | KillService
)
FromSupervisor = Status | Health | Done | Drain | Crashed | Vacate | Forget


# The supervisor of a machine that joins <-> the pipeline's ----------------------------------------


class Join(Message, tag="join"):
    """The first message on every connection. Of another version nothing else can be read.

    `machine` is the machine's name, and `number` the one that it had on an earlier connection, or
    0. The answer is `Joined` or `NotJoined`.
    """

    version: str
    machine: str = ""
    number: int = 0


class Joined(Message, tag="joined"):
    """What the machine is to run with. The numbers of its services count from `first_of(number)`.
    `settings` (JSON) are those of the pipeline's `Settings` that are not a machine's own; `model`
    is as the pipeline's command line names it, and `fingerprint` tells its files from others."""

    number: int
    settings: bytes
    fingerprint: str


class NotJoined(Message, tag="not_joined"):
    why: str


class Services(Message, tag="services"):
    """Twice a second: the machine's services, and which engines are being stopped for good, or have
    been."""

    services: list[ServiceStatus]
    leaving: list[int]


class Left(Message, tag="left"):
    """The services of the machine have ended for good."""


class Over(Message, tag="over"):
    """The pipeline ends, and the machine's services with it."""


ToPipeline = Join | Services | Crashed | Vacate | Drained | StatusRequest | Done | Left
ToMachine = Joined | NotJoined | Status | Vacated | Drain | Scale | Restart | KillService | Over
