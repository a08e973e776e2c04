"""What the launcher hands to the HTTP servers: a socket that listens, and the keys."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shlex
import socket
import ssl
from pathlib import Path

import msgspec

from nanovllm.api_keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, api_keys
from nanovllm.service import LISTENER_VARIABLE, PAGE_TOKEN_VARIABLE
from nanovllm.settings import Settings, SettingsError
from nanovllm.transport.endpoints import host_and_port, is_loopback

log = logging.getLogger(__name__)

# Connections that wait while no HTTP server takes them, where the system grants as many.
BACKLOG = 4096


class Listener:
    """The socket of all HTTP servers, and the keys that open them.

    The launcher holds the socket, so that connections wait while an HTTP server starts again. Keys
    are never in a command line: the variables that may hold some are taken from the environment,
    and only HTTP servers get them back. So do all HTTP servers have the same token for pages.

    Raises:
        SettingsError: the address, the keys or the TLS files cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        host, port = host_and_port(settings.http)
        self._keys = api_keys(os.environ.pop(API_KEY_VARIABLE, ""), settings.api_key_file)
        self._admin_keys = api_keys(
            os.environ.pop(ADMIN_KEY_VARIABLE, ""),
            settings.admin_key_file,
            "--admin-key-file",
            ADMIN_KEY_VARIABLE,
        )
        self._page_token = secrets.token_urlsafe()
        self._host = host
        self._tls_certificate = settings.tls_certificate
        if not is_loopback(host) and not self._keys and not settings.insecure:
            raise SettingsError(
                f"--http {settings.http} is beyond loopback, and whoever reaches it may use the"
                f" pipeline: bind 127.0.0.1, give keys by --api-key-file or {API_KEY_VARIABLE}, or"
                " allow it with --insecure"
            )
        if not is_loopback(host) and not settings.tls_certificate:
            log.warning(
                "--http %s: the network can read along, keys too: --tls-certificate hides them",
                settings.http,
            )
        if settings.tls_certificate:
            _check_tls(settings.tls_certificate, settings.tls_key)
        self._socket = _listen(settings.http, host, port)

    @property
    def url(self) -> str:
        """Where this machine reaches the HTTP servers."""
        host = self._host if self._host not in ("", "0.0.0.0", "::") else "127.0.0.1"
        host = f"[{host}]" if ":" in host else host
        scheme = "https" if self._tls_certificate else "http"
        return f"{scheme}://{host}:{self._socket.getsockname()[1]}"

    @property
    def descriptors(self) -> list[int]:
        """What an HTTP server inherits, as `environment` names it."""
        return [self._socket.fileno()]

    @property
    def environment(self) -> dict[str, str]:
        keys = {API_KEY_VARIABLE: self._keys, ADMIN_KEY_VARIABLE: self._admin_keys}
        return {
            LISTENER_VARIABLE: str(self._socket.fileno()),
            PAGE_TOKEN_VARIABLE: self._page_token,
            **{name: ",".join(some) for name, some in keys.items() if some},
        }

    def curl(self, model: str) -> str:
        """A command that asks the model."""
        question = {"model": model, "messages": [{"role": "user", "content": "Who are you?"}]}
        words = ["curl", f"{self.url}/v1/chat/completions", "-H", "Content-Type: application/json"]
        words += ["--cacert", self._tls_certificate] if self._tls_certificate else []
        words += ["-d", msgspec.json.encode(question).decode()]
        first = f"${{{API_KEY_VARIABLE}%%,*}}"  # the variable may hold several keys
        key = f' -H "Authorization: Bearer {first}"' if self._keys else ""
        return shlex.join(words) + key

    def close(self) -> None:
        self._socket.close()


def _check_tls(certificate: str, key: str) -> None:
    def refuse() -> str:
        raise SettingsError(
            f"--tls-key {key} is encrypted: decrypt it, for example by openssl pkey"
        )

    for option, file in (("--tls-certificate", certificate), ("--tls-key", key)):
        try:
            Path(file).read_bytes()
        except OSError as error:
            raise SettingsError(f"{option} {file} cannot be read: {error.strerror}") from None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, refuse)
    except ssl.SSLError as error:
        raise SettingsError(
            f"--tls-certificate {certificate} and --tls-key {key} cannot be used: {error}"
        ) from None


def _listen(option: str, host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(
            host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = found[0]
        listening = socket.socket(family)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(BACKLOG)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SettingsError(
                f"--http {option} is taken by another process: stop that one, name another"
                " HOST:PORT, or '' to serve no HTTP"
            ) from None
        raise SettingsError(f"--http {option} cannot be bound: {error.strerror}") from None
    return listening
