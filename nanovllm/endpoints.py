"""Where sockets are bound, and that nobody else has bound there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable

import zmq

# In front of an endpoint: without ZeroMQ, see `direct.py`.
DIRECT = "direct+"


class EndpointUnusable(OSError):
    """Nobody can bind this endpoint, or it is none."""


class EndpointTaken(EndpointUnusable):
    """Another process has bound this endpoint."""


def bind(endpoint: str, do_bind: Callable[[], object]) -> Callable[[], None]:
    """Calls `do_bind`, which binds `endpoint`; the returned function undoes what closing the
    socket would leave behind.

    A second bind on a live ipc path succeeds and steals it, so an ipc endpoint is held by a lock
    on a file beside it, which ends with the process however that ends.

    Raises:
        EndpointTaken: if another process has it.
        EndpointUnusable: if it cannot be bound for another reason.
    """
    held: int | None = None
    endpoint = endpoint.removeprefix(DIRECT)
    scheme, _, path = endpoint.partition("://")
    try:
        if scheme == "ipc":
            held = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        do_bind()
    except (OSError, zmq.ZMQError) as error:
        if held is not None:
            os.close(held)
        if error.errno in (errno.EADDRINUSE, errno.EWOULDBLOCK):
            raise EndpointTaken(f"{endpoint} is taken by another process") from None
        raise EndpointUnusable(f"cannot bind {endpoint}: {error.strerror or error}") from None

    def release() -> None:
        if held is not None:
            for leftover in (path, f"{path}.lock"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(leftover)
            os.close(held)

    return release
