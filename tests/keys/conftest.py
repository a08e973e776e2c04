"""A pipeline whose TCP endpoint takes keys alone."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.support.pipeline import Pipeline
from nanovllm.keys import make_keys


class Locked(NamedTuple):
    """A running pipeline with keys.

    Attributes:
        endpoint: the one over TCP.
        keys: the directory.
    """

    pipeline: Pipeline
    endpoint: str
    keys: Path

    def client_key(self, name: str) -> str:
        """Makes a client's key; the path of its file."""
        make_keys(self.keys, name)
        return str(self.keys / "clients" / f"{name}.key")

    def take_back(self, name: str) -> None:
        (self.keys / "clients" / f"{name}.pub").unlink()


@pytest.fixture(scope="session")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    """On the simulated device, for all tests of a run."""
    keys = tmp_path_factory.mktemp("keys")
    make_keys(keys, None)
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    arguments = ("--device", "sim", "--sim-step-ms", "4", "--ingress", endpoint)
    with Pipeline("", *arguments, "--keys", str(keys)) as running:
        yield Locked(running, endpoint, keys)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
