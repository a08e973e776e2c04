"""Where sockets are bound: what an endpoint may be, and that nobody else has bound it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
from collections.abc import Callable

import zmq

# sockaddr_un.sun_path, less its terminating zero.
LONGEST_IPC_PATH = 107
_TCP = re.compile(r"tcp://(\*|[\w.-]+):(\d{1,5})", re.ASCII)


class EndpointUnusable(OSError):
    """Nobody can bind this endpoint."""


class EndpointTaken(EndpointUnusable):
    """Another process has bound this endpoint."""


def parse(endpoint: str) -> str | tuple[str, int]:
    """The path of `ipc://PATH`, or host and port of `tcp://HOST:PORT`.

    The host is an address or a name; "", written `*`, is every interface. What ZeroMQ would choose
    by itself (a port, a file) nobody would find, so that is to be named.

    Raises ValueError if it is neither; the message says what it must be.
    """
    scheme, _, path = endpoint.partition("://")
    if scheme == "ipc" and path[:1] not in ("", "*", "@"):
        if len(os.fsencode(path)) > LONGEST_IPC_PATH:
            raise ValueError(f"the path has more than {LONGEST_IPC_PATH} bytes")
        return path
    found = _TCP.fullmatch(endpoint)
    if found is None or not 1 <= int(found[2]) <= 65535:
        raise ValueError("must be tcp://HOST:PORT, with a PORT from 1 to 65535, or ipc://PATH")
    return found[1].replace("*", ""), int(found[2])


def connectable(endpoint: str) -> str:
    """What is reached from this machine where `endpoint` is bound, perhaps at every interface."""
    return re.sub(r"(?<=tcp://)(\*|0\.0\.0\.0)(?=:)", "127.0.0.1", endpoint)


def check_free(endpoint: str) -> None:
    """Raises as `bind` does if `endpoint` cannot be bound now, or not be found by its name: ZeroMQ
    would bind an interface's, too."""
    address = parse(endpoint)
    if isinstance(address, str):
        bind(endpoint, lambda: None)()
        return
    # Does not listen: clients that wait for a pipeline are not to take this for it.
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bind(endpoint, lambda: probe.bind(address))


def bind(endpoint: str, do_bind: Callable[[], object]) -> Callable[[], None]:
    """Calls `do_bind`, which binds `endpoint`; the returned function undoes what closing the
    socket would leave behind.

    A second bind on a live ipc path succeeds and steals it, so an ipc endpoint is held by a lock
    on a file beside it, which ends with the process however that ends. What is there and is no
    socket stays: a bind would remove it.

    Raises:
        EndpointTaken: if another process has it.
        EndpointUnusable: if it cannot be bound for another reason.
    """
    held: int | None = None
    scheme, _, path = endpoint.partition("://")
    try:
        if scheme == "ipc":
            if os.path.exists(path) and not stat.S_ISSOCK(os.stat(path).st_mode):
                raise FileExistsError(errno.EEXIST, "a file that is no socket is there")
            held = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        do_bind()
    except (OSError, zmq.ZMQError) as error:
        if held is not None:
            os.close(held)
        if error.errno in (errno.EADDRINUSE, errno.EWOULDBLOCK):
            raise EndpointTaken(
                f"{endpoint} is taken by another process: stop that one, or name another endpoint"
            ) from None
        # ZeroMQ's reason names the address again.
        why = str(error.strerror or error).partition(" (addr=")[0]
        raise EndpointUnusable(f"{endpoint} cannot be bound: {why}") from None

    def release() -> None:
        if held is not None:
            for leftover in (path, f"{path}.lock"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(leftover)
            os.close(held)

    return release
