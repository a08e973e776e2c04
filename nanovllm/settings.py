"""Every option of the pipeline, once: its name, type, range, default and help.

`options.py` makes the command lines of the launcher and of each service from this struct. The
launcher hands its settings on to the services as command lines.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from nanovllm.log import LogFormat
from nanovllm.tracing import check_endpoint, exporter_is_installed
from nanovllm.transport.endpoints import LONGEST_IPC_PATH, host_and_port, is_local

DEFAULT_INGRESS = "tcp://127.0.0.1:5555"
DEFAULT_HTTP = "127.0.0.1:8000"
# What a terminal's commands use where no option says which pipeline.
ENDPOINT_VARIABLE = "NANOVLLM_ENDPOINT"
RUNTIME_DIR_VARIABLE = "NANOVLLM_RUNTIME_DIR"
KEYS_VARIABLE = "NANOVLLM_KEYS"
# The sockets in the runtime directory, as patterns: those of an engine end in its number.
SOCKETS = ("ingress", "services", "control", "scheduler-*", "workers-*")
ROLES = ("ingress", "tokenizer", "scheduler", "gpu_worker", "detokenizer", "http")
# What can be restarted, and what can be scaled: an engine is a scheduler and its gpu_workers.
RESTARTABLE = (*ROLES, "engine", "all")
SCALABLE = ("tokenizer", "detokenizer", "http", "engine")
# As browsers write it: no path, no slash at the end. A page from a file has the origin "null".
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+")
# At most so many services of a role that can be scaled, on one machine.
MAX_SERVICES = 64
# What a machine that joins brings, each none unless its option is given.
JOINING = ("engines", "tokenizers", "detokenizers", "http_servers")


class SettingsError(ValueError):
    """Options that are not valid, alone or together; the message names the option to change."""


def default_runtime_dir() -> str:
    """The directory of a pipeline's sockets, unless `--runtime-dir` names another."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.path.isdir(base):
        return os.path.join(base, "nanovllm")
    return os.path.join(tempfile.gettempdir(), f"nanovllm-{os.getuid()}")


def with_fitting_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """The options given, and beside them those whose default the given ones would contradict:
    fewer sequences for a smaller token budget, a larger budget for more sequences; and of the
    services that join a pipeline those alone that are named."""
    defaults = Settings()
    budget, sequences = given.get("max_num_batched_tokens"), given.get("max_num_seqs")
    moved: dict[str, int] = dict.fromkeys(JOINING, 0) if given.get("join") else {}
    if isinstance(budget, int) and 1 <= budget < defaults.max_num_seqs:
        moved["max_num_seqs"] = budget
    if isinstance(sequences, int) and sequences > defaults.max_num_batched_tokens:
        moved["max_num_batched_tokens"] = sequences
    return {**moved, **given}


def flag(name: str) -> str:
    """The option of the field `name`."""
    return "--" + name.replace("_", "-")


def _option(help_text: str, *, path: bool = False) -> Meta:
    """`path`: whether the option names a file or directory, as `ipc://PATH` does too."""
    return Meta(description=help_text, extra={"path": path})


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One pipeline's settings. Every field is an option: `max_num_seqs` is `--max-num-seqs`.

    Raises:
        SettingsError: options that are not valid together. (msgspec checks types and ranges.)
    """

    model: Annotated[
        str,
        _option(
            "Checkpoint directory or hub id of a Qwen3 or Qwen2.5 model; the demo if not given.",
            path=True,
        ),
    ] = ""
    ingress: Annotated[
        str,
        _option(
            "Where clients connect, besides ipc in the runtime directory: tcp://HOST:PORT or"
            " ipc://PATH; '' for only there.",
            path=True,
        ),
    ] = DEFAULT_INGRESS
    http: Annotated[
        str,
        _option(
            "HOST:PORT of the OpenAI-compatible HTTP server; port 0 takes a free one, '' serves no"
            " HTTP."
        ),
    ] = DEFAULT_HTTP
    services: Annotated[
        str,
        _option(
            "Where other machines --join: tcp://HOST:PORT, which takes PORT + 1 too; '' for one"
            " machine alone."
        ),
    ] = ""
    join: Annotated[
        str,
        _option(
            "The --services of a running pipeline: adds the --engines, --tokenizers,"
            " --detokenizers and --http-servers that are named here to it, on this machine."
        ),
    ] = ""
    advertise: Annotated[
        str,
        _option(
            "The address by which the other machines reach this one, if not that of --services, or"
            " that of the connection to --join."
        ),
    ] = ""
    insecure: Annotated[
        bool,
        _option(
            "Allow an --ingress, --services or --join, or an --http without keys, beyond loopback:"
            " for networks that you trust."
        ),
    ] = False
    keys: Annotated[
        str,
        _option(
            "Directory of keys that `nanovllm keygen` has made: TCP sockets then take only clients"
            " and services that have one.",
            path=True,
        ),
    ] = ""
    api_key_file: Annotated[
        str,
        _option(
            "File of keys, one a line: HTTP requests must bring one of them, or one of the variable"
            " NANOVLLM_API_KEY (several with commas).",
            path=True,
        ),
    ] = ""
    admin_key_file: Annotated[
        str,
        _option(
            "File of keys, one a line, or the variable NANOVLLM_ADMIN_KEY: who has one may kill"
            " services from the page at /. They open all else too. Without API keys and on loopback"
            " none is needed.",
            path=True,
        ),
    ] = ""
    tls_certificate: Annotated[
        str,
        _option(
            "PEM file with the HTTP server's certificate chain: it then speaks HTTPS.", path=True
        ),
    ] = ""
    tls_key: Annotated[
        str, _option("PEM file with the private key of --tls-certificate.", path=True)
    ] = ""
    cors: Annotated[
        str,
        _option("Origins whose pages may use the HTTP server, with commas; * for any, '' none."),
    ] = ""
    served_model_name: Annotated[
        str, _option("The model's name over HTTP; the directory's or hub name if not given.")
    ] = ""
    generation_config: Annotated[
        Literal["auto", "none"],
        _option(
            "Sampling defaults over HTTP: auto takes those of generation_config.json, none ignores"
            " them."
        ),
    ] = "auto"
    runtime_dir: Annotated[
        str, _option("Private directory of this pipeline's sockets.", path=True)
    ] = msgspec.field(default_factory=default_runtime_dir)

    tensor_parallel_size: Annotated[
        int, Meta(ge=1, le=8), _option("Ranks that share the model.")
    ] = 1
    engines: Annotated[
        int,
        Meta(ge=0, le=MAX_SERVICES),
        _option("Engines: a scheduler and --tp ranks each, which share the requests."),
    ] = 1
    gpus: Annotated[
        str,
        _option(
            "GPUs for the engines, of those visible, as 0,1,4,5: each takes the next --tp of them;"
            " '' for all."
        ),
    ] = ""
    tokenizers: Annotated[int, Meta(ge=0, le=MAX_SERVICES), _option("Tokenizer processes.")] = 1
    detokenizers: Annotated[int, Meta(ge=0, le=MAX_SERVICES), _option("Detokenizer processes.")] = 1
    http_servers: Annotated[int, Meta(ge=0, le=MAX_SERVICES), _option("HTTP server processes.")] = 1

    device: Annotated[
        Literal["auto", "cuda", "cpu", "sim"],
        _option("auto: cuda where there is one, else cpu. sim: no model, steps of a fixed time."),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        _option("auto: the checkpoint's on cuda, float32 on a cpu."),
    ] = "auto"
    quantization: Annotated[
        Literal["auto", "fp8"],
        _option(
            "auto: as the checkpoint is. fp8: quantizes the projections' weights on loading, which"
            " halves their memory on a Hopper GPU (H100, H200), and on no other device."
        ),
    ] = "auto"
    attention: Annotated[
        Literal["auto", "flash-attn", "triton", "sdpa"],
        _option("Attention backend; auto takes the fastest that can run."),
    ] = "auto"
    enforce_eager: Annotated[bool, _option("Never use CUDA graphs.")] = False
    gpu_memory_utilization: Annotated[
        float, Meta(gt=0, le=1), _option("Share of the GPU's memory to take, KV cache included.")
    ] = 0.9
    sim_step_ms: Annotated[
        float, Meta(gt=0, le=60_000), _option("Device time of a step on --device sim.")
    ] = 2.0

    max_model_len: Annotated[
        int, Meta(ge=2), _option("Longest sequence, prompt and output, in tokens.")
    ] = 4096
    max_num_seqs: Annotated[
        int, Meta(ge=1, le=65536), _option("Slots: sequences that run at the same time.")
    ] = 512
    max_num_batched_tokens: Annotated[
        int, Meta(ge=1), _option("Token budget of a step, decodes and prefill together.")
    ] = 16384
    max_prefill_tokens: Annotated[
        int, Meta(ge=1), _option("Most prefill tokens in a step that also decodes.")
    ] = 2048
    kvcache_block_size: Annotated[
        int, Meta(ge=1, le=65536), _option("Tokens in a block of the KV cache.")
    ] = 256
    num_kvcache_blocks: Annotated[
        int, Meta(ge=-1), _option("Blocks of the KV cache; -1: as many as memory allows.")
    ] = -1
    pipeline_depth: Annotated[
        int,
        Meta(ge=1, le=8),
        _option(
            "Step plans in flight; 1 waits for each result. More than 3 only while steps are short."
        ),
    ] = 4

    max_message_bytes: Annotated[
        int, Meta(ge=1024), _option("Largest frame or HTTP body that a client may send.")
    ] = 8 << 20
    max_pending_requests: Annotated[
        int,
        Meta(ge=1),
        _option(
            "Unfinished requests that the ingress holds at most; of one session, half of what the"
            " others leave."
        ),
    ] = 16384

    drain_timeout: Annotated[
        float,
        Meta(ge=0, le=86_400),
        _option("Seconds that unfinished requests have to finish after SIGTERM or Ctrl-C."),
    ] = 30.0

    otlp: Annotated[
        str,
        _option(
            "Where traces of requests go, by OTLP over HTTP, as http://127.0.0.1:4318; '' traces"
            " nothing. Needs nanovllm[otlp]."
        ),
    ] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], _option("The least that is logged.")
    ] = "info"
    log_format: Annotated[LogFormat, _option("Lines of text, or a JSON object for each event.")] = (
        "text"
    )

    def __post_init__(self) -> None:
        if not self.runtime_dir:
            raise SettingsError("--runtime-dir is empty: name a directory")
        for name in ("join",) if self.join else ("ingress", "services"):
            self._check_endpoint(name, getattr(self, name))
        self._check_machines()
        if self.num_kvcache_blocks == 0:
            raise SettingsError("--num-kvcache-blocks is 0: give 1 or more, or -1")
        if self.http:
            try:
                host_and_port(self.http)
            except ValueError as error:
                raise SettingsError(f"--http {self.http}: {error}") from None
        else:
            for option, value in (
                ("--api-key-file", self.api_key_file),
                ("--admin-key-file", self.admin_key_file),
                ("--tls-certificate", self.tls_certificate),
                ("--cors", self.cors),
            ):
                if value:
                    raise SettingsError(
                        f"--http '' serves no HTTP, and {option} is for HTTP alone: leave one away"
                    )
        for origin in filter(None, map(str.strip, self.cors.split(","))):
            if not _ORIGIN.fullmatch(origin):
                raise SettingsError(
                    f"--cors {origin}: must be an origin, as browsers write it:"
                    " https://page.example or http://localhost:3000"
                )
        if self.otlp:
            self._check_otlp()
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise SettingsError("--tls-certificate and --tls-key belong together: name both")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise SettingsError(
                f"--max-num-batched-tokens ({self.max_num_batched_tokens}) must be at least"
                f" --max-num-seqs ({self.max_num_seqs}): each running sequence takes one token"
                " of a step"
            )

    def in_runtime_dir(self, name: str) -> str:
        """The ipc endpoint `name` in the runtime directory.

        Raises SettingsError if the path is too long for a socket.
        """
        path = str(Path(self.runtime_dir).absolute() / f"{name}.sock")
        if len(os.fsencode(path)) > LONGEST_IPC_PATH:
            raise SettingsError(
                f"--runtime-dir is too long: {path} has more than {LONGEST_IPC_PATH} bytes"
            )
        return f"ipc://{path}"

    def _check_endpoint(self, name: str, endpoint: str) -> None:
        if not endpoint:
            return
        try:
            local = is_local(endpoint)
        except ValueError as error:
            raise SettingsError(f"{flag(name)} {endpoint}: {error}") from None
        if not local and not self.keys and not self.insecure:
            raise SettingsError(
                f"{flag(name)} {endpoint} is beyond loopback, and whoever reaches it may use the"
                " pipeline: make keys with `nanovllm keygen` and name them with --keys, bind"
                " 127.0.0.1, or allow it with --insecure"
            )

    def _check_otlp(self) -> None:
        try:
            check_endpoint(self.otlp)
        except ValueError as error:
            raise SettingsError(f"--otlp {self.otlp}: {error}") from None
        if not exporter_is_installed():
            raise SettingsError(
                "--otlp sends by OpenTelemetry, which is not installed: pip install"
                " 'nanovllm[otlp]', or leave --otlp"
            )

    def _check_machines(self) -> None:
        if self.services and self.join:
            raise SettingsError("--services and --join: a machine that joins is not joined itself")
        if self.advertise and not self.services and not self.join:
            raise SettingsError("--advertise goes with --services or --join: name one, or leave it")
        for name in ("services", "join"):
            endpoint: str = getattr(self, name)
            if endpoint.startswith("ipc:") or endpoint.endswith(":65535"):
                raise SettingsError(
                    f"{flag(name)} {endpoint}: must be tcp://HOST:PORT, with a PORT below 65535"
                )
        if self.scheduler_beyond:
            if _host(self.scheduler_beyond) in ("*", "0.0.0.0"):
                raise SettingsError(
                    f"--services {self.services}: name an address of this machine, by which others"
                    " reach it, or --advertise one"
                )
            self._check_endpoint("advertise", self.scheduler_beyond.replace(":0", ":1"))
        if not self.join and not self.services:
            for name in JOINING:
                if not getattr(self, name):
                    raise SettingsError(
                        f"{flag(name)} is 0: that goes with --services, from where others join"
                    )

    @property
    def client_endpoints(self) -> list[str]:
        """Where the ingress binds for clients."""
        local = self.in_runtime_dir("ingress")
        return [local] if self.ingress in ("", local) else [self.ingress, local]

    @property
    def ingress_endpoint(self) -> str:
        """Where HTTP servers, which are clients, connect to the ingress."""
        return self.ingress if self.join else self.in_runtime_dir("ingress")

    @property
    def services_endpoint(self) -> str:
        """Where the other services connect to the ingress."""
        return _next_port(self.join) if self.join else self.in_runtime_dir("services")

    @property
    def services_beyond(self) -> str:
        """Where the ingress binds for services of other machines; empty if none can join."""
        return _next_port(self.services) if self.services else ""

    def scheduler_endpoint(self, engine: int) -> str:
        """Where an engine's scheduler binds for gpu_worker rank 0, and for the detokenizers if
        there is one machine alone."""
        return self.in_runtime_dir(f"scheduler-{engine}")

    @property
    def scheduler_beyond(self) -> str:
        """Where schedulers bind for the detokenizers of all machines, at ports that the system
        chooses; empty if there is one machine alone."""
        host = self.advertise or _host(self.services)
        return f"tcp://{host}:0" if (self.services or self.join) and host else ""

    def workers_endpoint(self, engine: int) -> str:
        """Where an engine's gpu_worker rank 0 binds for the other ranks."""
        return self.in_runtime_dir(f"workers-{engine}")

    @property
    def control_endpoint(self) -> str:
        """Where the supervisor binds for services and commands."""
        return self.in_runtime_dir("control")


def _next_port(endpoint: str) -> str:
    address, _, port = endpoint.rpartition(":")
    return f"{address}:{int(port) + 1}"


def _host(endpoint: str) -> str:
    return endpoint.removeprefix("tcp://").rpartition(":")[0]
