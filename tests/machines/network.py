"""Machines that are network namespaces, behind a router that can drop what passes."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import NamedTuple


class Host(NamedTuple):
    """A namespace with an address of its own."""

    number: int
    namespace: str
    address: str

    @property
    def within(self) -> list[str]:
        """What runs a command on it."""
        return ["ip", "netns", "exec", self.namespace]


class Network:
    """Hosts that reach one another through a router.

    Raises:
        RuntimeError: namespaces cannot be made here; the message says why.
    """

    def __init__(self, count: int) -> None:
        if os.geteuid() != 0 or shutil.which("ip") is None:
            raise RuntimeError("network namespaces need root and `ip` of iproute2")
        name = f"nv{os.getpid()}"
        self._router = f"{name}r"
        self.hosts = [Host(i, f"{name}h{i}", f"10.77.{i}.2") for i in range(count)]
        try:
            self._make()
        except RuntimeError:
            self.close()
            raise

    def cut(self, host: Host) -> None:
        """From now on the router drops what comes from the host and what goes to it, in silence."""
        self._in_router("rule", "add", "iif", f"h{host.number}", "blackhole")
        self._in_router("route", "add", "blackhole", host.address)

    def heal(self, host: Host) -> None:
        self._in_router("rule", "del", "iif", f"h{host.number}", "blackhole")
        self._in_router("route", "del", "blackhole", host.address)

    def cut_between(self, one: Host, other: Host) -> None:
        """Drops what these two send each other."""
        self._between("add", one, other)

    def heal_between(self, one: Host, other: Host) -> None:
        self._between("del", one, other)

    def _between(self, what: str, one: Host, other: Host) -> None:
        for a, b in ((one, other), (other, one)):
            self._in_router("rule", what, "iif", f"h{a.number}", "to", b.address, "blackhole")

    def close(self) -> None:
        for namespace in (self._router, *(host.namespace for host in self.hosts)):
            with contextlib.suppress(RuntimeError):  # it was not made
                _run("ip", "netns", "del", namespace)

    def _make(self) -> None:
        _run("ip", "netns", "add", self._router)
        _run("ip", "netns", "exec", self._router, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        for number, namespace, address in self.hosts:
            inner, outer = "eth0", f"h{number}"
            _run("ip", "netns", "add", namespace)
            self._in_router("link", "add", outer, "type", "veth", "peer", inner, "netns", namespace)
            self._in_router("addr", "add", f"10.77.{number}.1/24", "dev", outer)
            self._in_router("link", "set", outer, "up")
            _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", inner)
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
            _run("ip", "-n", namespace, "link", "set", inner, "up")
            _run("ip", "-n", namespace, "route", "add", "default", "via", f"10.77.{number}.1")

    def _in_router(self, *words: str) -> None:
        _run("ip", "-n", self._router, *words)


def _run(*words: str) -> None:
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(words)}: {ran.stderr.strip()}")


@contextlib.contextmanager
def network(count: int) -> Iterator[Network]:
    made = Network(count)
    try:
        yield made
    finally:
        made.close()
