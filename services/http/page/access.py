"""Who may kill a service from the page: the page itself, and beyond loopback an admin.

A page of another site can have a browser send requests here, and with DNS rebinding even read the
answers. It cannot forge `Origin` and `Host`.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from nanovllm.services.http.errors import ApiError
from nanovllm.transport.endpoints import is_loopback

TOKEN_HEADER: Final = "x-page-token"
_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Access:
    """What a request to kill a service must bring.

    Attributes:
        token: of the pages of these HTTP servers.
        bound: the host that the HTTP servers were told to bind.
        locked: whether requests of any kind need an API key.
        admin_keys: a request to kill must bring one of them. Without any, kills are for this
            machine alone, and only while there are no API keys.
    """

    token: str
    bound: str
    locked: bool
    admin_keys: Sequence[str]

    @property
    def allows(self) -> bool:
        """Whether anyone may kill."""
        return bool(self.admin_keys) or (is_loopback(self.bound) and not self.locked)

    def token_for(self, host: str, server: tuple[str, int], scheme: str) -> str:
        """The token for a page that was asked for by this `Host`; empty if it may not kill."""
        return self.token if self.allows and self._is_own(host, server, scheme) else ""

    def check(self, headers: Mapping[str, str], server: tuple[str, int], scheme: str) -> None:
        """Raises ApiError unless a request with these headers may kill.

        Args:
            headers: by names in lower case.
            server: the address and port that the request came to.
            scheme: http or https.
        """
        host = headers.get("host", "")
        if not self.allows:
            raise _refused(
                "beyond loopback, and where API keys are set, an admin key is needed to kill a"
                " service: launch with --admin-key-file"
            )
        if not self._is_own(host, server, scheme):
            raise _refused(f"{host!r} is not this server's name; --http HOST:PORT says it")
        if headers.get("origin", "").lower() != f"{scheme}://{host}".lower():
            raise _refused("only the server's own page may kill a service")
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise _refused("Content-Type must be application/json")
        if not _same(headers.get(TOKEN_HEADER, ""), self.token):
            raise _refused("the page is not this launch's: load it again")
        key = headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self.admin_keys and not sum(_same(key, one) for one in self.admin_keys):
            raise ApiError(401, "killing a service needs an admin key", code="invalid_admin_key")

    def _is_own(self, host: str, server: tuple[str, int], scheme: str) -> bool:
        """Whether a request's `Host` names this server: by the address that the request came to, as
        localhost, or by the name that was bound."""
        address, port = server
        ip = ipaddress.ip_address(address)
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
            ip = ip.ipv4_mapped
        names = {f"[{ip}]" if ip.version == 6 else str(ip), self.bound}
        if ip.is_loopback:
            names.add("localhost")
        own = {f"{name}:{port}".lower() for name in names if name}
        if port == _PORTS[scheme]:
            own |= {name.lower() for name in names if name}
        return host.lower() in own


def _refused(why: str) -> ApiError:
    return ApiError(403, why, code="forbidden")


def _same(given: str, wanted: str) -> bool:
    """Compares in a time that says nothing."""
    digests = (hashlib.sha256(text.encode()).digest() for text in (given, wanted))
    return hmac.compare_digest(*digests)
