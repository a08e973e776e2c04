"""What `up` plans, and what actors and commands tell one another."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import msgspec

from nanovllm.api_keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from nanovllm.control import Status
from nanovllm.keys import SERVICES, PipelineKeys, make_keys
from nanovllm.options import settings_argv
from nanovllm.settings import Settings, SettingsError, flag

KEYS = "keys"
WAITS = "waits for a node"
STARTS = "starts"
# Options that name files of the machine of `up`: their contents go to the head.
FILES = ("api_key_file", "admin_key_file", "tls_certificate", "tls_key")
# Those of its variables that have secrets of the head.
VARIABLES = (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE)


class Secrets(msgspec.Struct, frozen=True):
    """What nobody may read: files, by their paths in the launcher's directory, and variables."""

    files: dict[str, bytes]
    environment: dict[str, str] = {}

    def __repr__(self) -> str:
        return "Secrets()"


class Launch(msgspec.Struct, frozen=True):
    """How an actor runs a launcher.

    Attributes:
        words: of the command line.
        says: what the launcher says when its services are ready.
    """

    words: list[str]
    says: str
    secrets: Secrets

    def arguments(self, directory: Path) -> list[str]:
        """The command line; its secrets are files in `directory`."""
        names = {name.partition("/")[0] for name in self.secrets.files}
        paths = [word for name in sorted(names) for word in (flag(name), str(directory / name))]
        return [*self.words, "--runtime-dir", str(directory), *paths]


class EnginePlan(msgspec.Struct, frozen=True):
    """What each engine takes.

    Attributes:
        gpus: 0: its model runs on the CPU, or is simulated.
        drain_s: seconds that its requests have at its end to finish or to move.
    """

    gpus: int
    drain_s: float


class Plan(msgspec.Struct, frozen=True):
    """A pipeline on a cluster.

    Attributes:
        settings: of the head, but for what depends on its node.
        port: of the services; they take the next one, too.
    """

    settings: Settings
    port: int
    engine: EnginePlan
    secrets: Secrets

    def head(self, host: str) -> Launch:
        """The launcher of the head, on the node with the address `host`."""
        services = f"tcp://{host}:{self.port}"
        settings = msgspec.structs.replace(self.settings, services=services, engines=0, keys=KEYS)
        words = [settings.model, *settings_argv(settings, without=("model",))]
        return Launch(words, "nanovllm serves", self.secrets)

    def joining(self, host: str) -> Launch:
        """The launcher of an engine."""
        words = ["--join", f"tcp://{host}:{self.port}", "--engines", "1", "--http", ""]
        for name in ("log_level", "log_format"):
            words += [flag(name), getattr(self.settings, name)]
        file = f"{KEYS}/{SERVICES}"
        secrets = Secrets({file: self.secrets.files[file]})
        return Launch(words, "joined the pipeline", secrets)


class HeadState(msgspec.Struct, frozen=True):
    """What the head says of itself.

    Attributes:
        ready: whether all of its own services have been.
        error: why its launcher has ended, while that has not started again.
        addresses: of HTTP, of the ingress and of the services, as other nodes reach them.
        engine: what a further engine takes.
        status: of the pipeline; None while its launcher does not answer.
    """

    ready: bool
    error: str
    addresses: dict[str, str]
    engine: EnginePlan
    status: Status | None


class EngineState(msgspec.Struct, frozen=True):
    """What an engine's actor says of itself; `ready` and `error` as the head's.

    Attributes:
        where: the address of its node; or WAITS for a node that has its resources free; or STARTS.
        number: of the engine in the pipeline, where that of each machine begin at another hundred;
            None before it has joined.
    """

    where: str
    ready: bool = False
    error: str = ""
    number: int | None = None


def secrets_of(settings: Settings) -> Secrets:
    """Reads the files that the options name, here. Makes keys, if the options name none.

    Raises:
        SettingsError: a file cannot be read, or keys are open to other users.
    """
    files: dict[str, bytes] = {}
    try:
        if settings.keys:
            _ = PipelineKeys(settings.keys).clients  # which checks them
            files = _read_keys(Path(settings.keys))
        else:
            with tempfile.TemporaryDirectory() as directory:
                made = Path(directory, KEYS)
                make_keys(made, None)
                files = _read_keys(made)
        for name in FILES:
            if path := getattr(settings, name):
                files[name] = Path(path).read_bytes()
    except OSError as error:
        raise SettingsError(f"{error.filename} cannot be read: {error.strerror}") from None
    return Secrets(files, {name: os.environ[name] for name in VARIABLES if name in os.environ})


def _read_keys(directory: Path) -> dict[str, bytes]:
    found = [*directory.glob("*.key"), *directory.glob("*/*.pub")]
    return {f"{KEYS}/{file.relative_to(directory)}": file.read_bytes() for file in found}
