"""A pipeline whose TCP endpoint takes keys alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.support.pipeline import Pipeline
from nanovllm.keys import make_keys
from tests.readers import free_tcp_endpoint


class Locked(NamedTuple):
    """A running pipeline with keys.

    Attributes:
        port: where it listens, on every interface.
        keys: the directory.
    """

    pipeline: Pipeline
    port: int
    keys: Path

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def client_key(self, name: str) -> str:
        """Makes a client's key; the path of its file."""
        make_keys(self.keys, name)
        return str(self.keys / "clients" / f"{name}.key")

    def take_back(self, name: str) -> None:
        (self.keys / "clients" / f"{name}.pub").unlink()


@contextlib.contextmanager
def locked_pipeline(keys: Path) -> Iterator[Locked]:
    """On the simulated device; makes the keys in this directory."""
    make_keys(keys, None)
    port = int(free_tcp_endpoint().rpartition(":")[2])
    arguments = ("--device", "sim", "--sim-step-ms", "4", "--ingress", f"tcp://*:{port}")
    with Pipeline("", *arguments, "--keys", str(keys)) as running:
        yield Locked(running, port, keys)
