"""Network namespaces: other machines, as far as the network goes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Final, NamedTuple

import pytest

# Of private networks, the one that others use least.
_NETWORK: Final = "10.213"


class Namespace(NamedTuple):
    """A machine beside this one, with one cable between the two.

    Attributes:
        name: of the namespace.
        here: the address of this machine on the cable.
        there: the address of the other.
    """

    name: str
    here: str
    there: str

    def python(self, *arguments: str) -> list[str]:
        """The command that runs this Python there."""
        return ["ip", "netns", "exec", self.name, sys.executable, *arguments]


@contextlib.contextmanager
def namespace() -> Iterator[Namespace]:
    """Skips the test, with the reason, where no namespace can be made."""
    number = os.getpid() % 16384
    third, fourth = number // 64, number % 64 * 4
    name, ours, theirs = f"nv{number}", f"nv{number}h", f"nv{number}c"
    made = Namespace(name, f"{_NETWORK}.{third}.{fourth + 1}", f"{_NETWORK}.{third}.{fourth + 2}")
    try:
        _ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        pytest.skip(f"no network namespace can be made here: {said.strip()}")
    try:
        _ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
        _ip("address", "add", f"{made.here}/30", "dev", ours)
        _ip("link", "set", ours, "up")
        _ip("-n", name, "address", "add", f"{made.there}/30", "dev", theirs)
        _ip("-n", name, "link", "set", theirs, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        yield made
    finally:
        _ip("netns", "delete", name)  # and the cable with it


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)
