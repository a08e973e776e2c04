"""Where sockets are bound: which endpoints are valid, and that no other process has bound one."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Callable

import zmq

from nanovllm import file_lock

# sockaddr_un.sun_path, less its terminating zero.
LONGEST_IPC_PATH = 107
_TCP = re.compile(r"tcp://(\*|[\w.-]+):(\d{1,5})", re.ASCII)
_HTTP = re.compile(r"(\*|[\w.-]+|\[[\da-fA-F:.]+\]):(\d{1,5})", re.ASCII)


class EndpointUnusable(OSError):
    """This endpoint cannot be bound."""


class EndpointTaken(EndpointUnusable):
    """Another process has bound this endpoint."""


def parse(endpoint: str) -> str | tuple[str, int]:
    """The path of `ipc://PATH`, or host and port of `tcp://HOST:PORT`.

    The host is an address or a name; `*` is every interface, and is returned as "". Port and path
    must be named: no client would find an endpoint that ZeroMQ chose by itself.

    Raises ValueError if `endpoint` is neither; the message says what it must be.
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


def is_local(endpoint: str) -> bool:
    """Whether only this machine reaches the endpoint. Raises like `parse`."""
    address = parse(endpoint)
    return isinstance(address, str) or is_loopback(address[0])


def host_and_port(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, as for `parse`; the host may also be an IPv6 address in
    brackets, and the port 0.

    Raises ValueError if `address` is something else; the message says what it must be.
    """
    found = _HTTP.fullmatch(address)
    if found is None or int(found[2]) > 65535:
        raise ValueError("must be HOST:PORT, with a PORT from 0 (a free one) to 65535")
    return found[1].replace("*", "").strip("[]"), int(found[2])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address or name `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def connectable(endpoint: str) -> str:
    """The endpoint to connect to from this machine, where `endpoint` is bound."""
    return re.sub(r"(?<=tcp://)(\*|0\.0\.0\.0)(?=:)", "127.0.0.1", endpoint)


def check_free(endpoint: str) -> None:
    """Raises like `bind` if `endpoint` cannot be bound now, or if its host does not resolve. ZeroMQ
    would also bind the name of an interface, which clients cannot connect to."""
    address = parse(endpoint)
    if isinstance(address, str):
        bind(endpoint, lambda: None)()
        return
    # The probe does not listen, so that clients that wait for a pipeline do not connect to it.
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bind(endpoint, lambda: probe.bind(address))


def bind(endpoint: str, do_bind: Callable[[], object]) -> Callable[[], None]:
    """Calls `do_bind`, which binds `endpoint`; the returned function undoes what closing the
    socket would leave behind.

    A second bind on a live ipc path succeeds, and takes the path from the first socket. So this
    locks a file beside the path. The lock ends with the process, however the process ends. A bind
    would also remove a file at the path; if the file is no socket, this refuses instead.

    Raises:
        EndpointTaken: another process has bound the endpoint.
        EndpointUnusable: the endpoint cannot be bound for another reason.
    """
    held: int | None = None
    scheme, _, path = endpoint.partition("://")
    try:
        if scheme == "ipc":
            if os.path.exists(path) and not stat.S_ISSOCK(os.stat(path).st_mode):
                raise FileExistsError(errno.EEXIST, "a file that is no socket is there")
            held = file_lock.hold(f"{path}.lock")
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
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            file_lock.release(f"{path}.lock", held)

    return release
