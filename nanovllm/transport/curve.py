"""CURVE on TCP sockets: both ends prove that they have their keys, and what travels is encrypted.

A socket that binds is opened for the keys of one ZAP domain. `Gate` answers libzmq's question
whether a key belongs to it, in the middle of the handshake. Of a peer without a right key no frame
reaches the program. The files of ipc endpoints are private, so ipc needs no keys.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import zmq

log = logging.getLogger(__name__)

# Whose keys open a socket: the client socket takes those of clients, the links those of services.
Domain = Literal["clients", "services"]
# A peer that does not finish its handshake is disconnected after this time.
HANDSHAKE_MS: Final = 5000
# Connections that the kernel holds until ZeroMQ's thread accepts them.
BACKLOG: Final = 1024
# How often at most the log tells of refused keys.
TELL_REFUSALS_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A public and a secret key, in Z85."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Curve:
    """The keys of one end of a TCP connection.

    Attributes:
        own: this end's.
        server: the public key of the end that binds.
        domain: whose keys the end that binds takes.
    """

    own: KeyPair
    server: bytes
    domain: Domain


def secure_to_connect(socket: zmq.Socket[Any], endpoint: str, curve: Curve | None) -> None:
    """Sets the options of a socket that is about to connect to `endpoint`."""
    if curve is not None and is_tcp(endpoint):
        socket.setsockopt(zmq.CURVE_SERVERKEY, curve.server)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, curve.own.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, curve.own.secret)


def secure_to_bind(socket: zmq.Socket[Any], endpoint: str, curve: Curve | None) -> None:
    """Sets the options of a socket that is about to bind `endpoint`.

    They hold for what is bound from now on. A context whose sockets bind with keys needs a `Gate`;
    without, they refuse everybody.
    """
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.BACKLOG, BACKLOG)
    if curve is not None and is_tcp(endpoint):
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, curve.own.secret)
        socket.setsockopt(zmq.ZAP_DOMAIN, curve.domain.encode())
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def is_tcp(endpoint: str) -> bool:
    return endpoint.startswith("tcp://")


class Gate:
    """Decides which keys open the sockets of a context that bind with keys, in a thread.

    Args:
        context: at most one Gate each.
        trusted: the public keys, in Z85, that open the sockets of a domain, or None if that cannot
            be told now; asked at each handshake, in the Gate's thread.
    """

    def __init__(
        self, context: zmq.Context[Any], trusted: Callable[[Domain], Container[bytes] | None]
    ) -> None:
        from zmq.auth.thread import ThreadAuthenticator  # slow to import, and seldom needed

        self._trusted = trusted
        self._tell_at = 0.0
        self._authenticator = ThreadAuthenticator(context)
        for domain in ("clients", "services"):
            self._authenticator.configure_curve_callback(domain, self)
        self._authenticator.start()

    def callback(self, domain: Domain, key: bytes) -> bool:
        """Called by the authenticator."""
        trusted = self._trusted(domain)
        if trusted is not None and key in trusted:
            return True
        now = time.monotonic()
        if now >= self._tell_at:
            self._tell_at = now + TELL_REFUSALS_S
            log.warning("refused a connection whose key is not one of the %s'", domain)
        return False

    def close(self) -> None:
        self._authenticator.stop()
