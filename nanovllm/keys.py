"""The CURVE keys of a pipeline: a directory that `nanovllm keygen` makes.

    server.key         of the client socket; only the machine of the ingress needs it
    services.key       of the services, on every machine
    clients/NAME.key   for a client to carry away
    clients/NAME.pub   stays: as long as this file is there, the client's key opens the client
                       socket

A file has the format of ZeroMQ certificates (ZPL). Beside its key pair, the file of a client or of
the services has the public key of the client socket, so that one file is enough to connect.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Set
from pathlib import Path
from typing import Final, NamedTuple

import zmq

from nanovllm.settings import KEYS_VARIABLE, SettingsError
from nanovllm.transport.curve import Curve, Domain, KeyPair, is_tcp

log = logging.getLogger(__name__)

SERVER: Final = "server.key"
SERVICES: Final = "services.key"
CLIENTS: Final = "clients"
_NAME: Final = re.compile(r"[\w-][\w.-]{0,63}", re.ASCII)
_LINE: Final = re.compile(r'\s*([a-z-]+)\s*=\s*"([^"]*)"\s*', re.ASCII)
_Z85_KEY: Final = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_KEEP_SECRET: Final = "# A key of nanovllm. Whoever has this file may use the pipeline."


class PipelineKeys:
    """What the services of a pipeline need of its directory of keys.

    Attributes:
        file: the services' key.
        services: for the links between services.
        door: for a service that is a client of the ingress.

    Raises:
        SettingsError: the directory cannot be used; the message says what to change.
    """

    def __init__(self, directory: str) -> None:
        _check_curve()
        root = Path(directory)
        if not root.is_dir():
            raise SettingsError(
                f"--keys {directory} is no directory: a pipeline takes the one that"
                " `nanovllm keygen` has made"
            )
        self.file = root / SERVICES
        self.door = _read_curve(self.file)
        own = self.door.own
        self.services = Curve(own, own.public, "services")
        self._server = root / SERVER
        self._trusted_clients = _PublicKeys(root / CLIENTS)

    @property
    def clients(self) -> Curve:
        """For the client socket."""
        server = _read_pair(self._server)
        return Curve(server, server.public, "clients")

    def trusted(self, domain: Domain) -> Set[bytes] | None:
        """The public keys that open sockets of this domain now; None: they cannot be read now.
        Services are clients too."""
        services = {self.services.own.public}
        if domain == "services":
            return services
        clients = self._trusted_clients.now()
        return None if clients is None else services | clients


def client_keys(endpoint: str, path: str | None) -> Curve | None:
    """What a client needs to connect to `endpoint`.

    Args:
        path: a client's key file, or the directory of a pipeline's keys; if None, the variable
            NANOVLLM_KEYS says which.

    Raises:
        SettingsError: the file cannot be used; the message says what to change.
    """
    path = os.environ.get(KEYS_VARIABLE) if path is None else path
    if not path or not is_tcp(endpoint):
        return None
    _check_curve()
    file = Path(path)
    return _read_curve(file / SERVICES if file.is_dir() else file)


def make_keys(directory: Path, client: str | None) -> list[Path]:
    """Makes the keys of a pipeline that are not there yet, and that of a `client`; returns the
    files made.

    Raises:
        SettingsError: there is a client of this name, the name is not valid, or the directory, or
            what is in it, cannot be used.
    """
    _check_curve()
    if client is not None and not _NAME.fullmatch(client):
        raise SettingsError(f"--client {client}: must be up to 64 letters, digits, _, - and .")
    _private_directory(directory)
    _private_directory(directory / CLIENTS)
    made = []
    if not (directory / SERVER).exists():
        if (directory / SERVICES).exists():
            raise SettingsError(f"{directory} has a {SERVICES} and no {SERVER}: name another")
        made.append(_write(directory / SERVER, _new_pair()))
    if not (directory / SERVICES).exists():
        server = _read_pair(directory / SERVER).public
        made.append(_write(directory / SERVICES, _new_pair(), server, "services"))
    if client is not None:
        made.append(_make_client_key(directory, client))
    return made


def _make_client_key(directory: Path, name: str) -> Path:
    secret, public = (directory / CLIENTS / f"{name}.{kind}" for kind in ("key", "pub"))
    pair = _new_pair()
    if public.exists():
        raise SettingsError(f"--client {name}: {public} is there: remove it, or take another name")
    made = _write(secret, pair, _read_pair(directory / SERVER).public, name)
    _write(public, KeyPair(pair.public, b""), name=name)
    return made


class _PublicKeys:
    """The public keys in a directory of `.pub` files. Files that hold none are logged once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read: dict[_Version, bytes | None] = {}
        self._told = False

    def now(self) -> Set[bytes] | None:
        """None: they cannot be read now, as where no descriptor is left. Any thread may ask."""
        before = self._read
        try:
            versions = [v for path in self._directory.glob("*.pub") if (v := _version(path))]
            read = {v: before[v] if v in before else _public(v.path) for v in versions}
        except OSError as error:
            if not self._told:
                log.error("%s cannot be read: nobody else gets in: %s", self._directory, error)
            self._told = True
            return None
        self._read, self._told = read, False
        return {key for key in read.values() if key is not None}


class _Version(NamedTuple):
    path: Path
    inode: int
    mtime_ns: int
    size: int


def _version(path: Path) -> _Version | None:
    """None if the file was removed a moment ago."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return _Version(path, stat.st_ino, stat.st_mtime_ns, stat.st_size)


def _public(path: Path) -> bytes | None:
    """Raises OSError if the file cannot be read now."""
    try:
        return _key(_parse(path), "public-key", path)
    except FileNotFoundError:
        return None  # it was removed a moment ago
    except (SettingsError, PermissionError) as error:
        log.error("a client's key opens nothing: %s", error)
        return None


def _read_curve(file: Path) -> Curve:
    read = _read_secret(file)
    own = KeyPair(_key(read, "public-key", file), _key(read, "secret-key", file))
    return Curve(own, _key(read, "server-key", file), "clients")


def _read_pair(file: Path) -> KeyPair:
    read = _read_secret(file)
    return KeyPair(_key(read, "public-key", file), _key(read, "secret-key", file))


def _read_secret(file: Path) -> dict[str, str]:
    read = _read(file)
    found = file.stat()
    # Root gives a file to a service by a group that may read it, as Kubernetes does by fsGroup.
    from_root = found.st_uid == 0 and os.geteuid() != 0
    if found.st_mode & (0o037 if from_root else 0o077):
        raise SettingsError(f"key file {file} is open to other users: chmod 600 it")
    return read


def _read(file: Path) -> dict[str, str]:
    try:
        return _parse(file)
    except OSError as error:
        raise SettingsError(f"key file {file} cannot be read: {error.strerror}") from None


def _parse(file: Path) -> dict[str, str]:
    try:
        lines = file.read_text("ascii").splitlines()
    except UnicodeDecodeError:
        raise SettingsError(f"key file {file} cannot be read: it is no text") from None
    return {found[1]: found[2] for line in lines if (found := _LINE.fullmatch(line))}


def _key(read: dict[str, str], name: str, file: Path) -> bytes:
    key = read.get(name, "")
    if not _Z85_KEY.fullmatch(key):
        raise SettingsError(f"key file {file} has no valid {name}: `nanovllm keygen` makes one")
    return key.encode()


def _new_pair() -> KeyPair:
    return KeyPair(*zmq.curve_keypair())


def _write(file: Path, pair: KeyPair, server: bytes = b"", name: str = "") -> Path:
    """Writes a file that is not there yet, which only its owner can read."""
    lines = [_KEEP_SECRET] if pair.secret else []
    if name:
        lines += ["metadata", f'    name = "{name}"']
    if server:
        lines.append(f'    server-key = "{server.decode()}"')
    lines += ["curve", f'    public-key = "{pair.public.decode()}"']
    if pair.secret:
        lines.append(f'    secret-key = "{pair.secret.decode()}"')
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingsError(f"key file {file} cannot be made: {error.strerror}") from None
    with os.fdopen(descriptor, "w") as opened:
        opened.write("\n".join([*lines, ""]))
    return file


def _private_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{directory} cannot be made: {error.strerror}") from None
    if directory.stat().st_mode & 0o077:
        raise SettingsError(f"{directory} is open to other users: chmod 700 it, or name another")


def _check_curve() -> None:
    if not zmq.has("curve"):
        raise SettingsError(
            "this libzmq is built without CURVE, so it has no keys: install pyzmq's own wheel"
            " (pip install --force-reinstall --only-binary pyzmq pyzmq)"
        )
