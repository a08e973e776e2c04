"""A Ray cluster whose nodes are processes of this machine, and `nanovllm-ray` on it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import ray
from ray.cluster_utils import Cluster as Nodes

from nanovllm.ray.cluster import Cluster
from nanovllm.settings import KEYS_VARIABLE

# Of the objects that Ray keeps, of which there are none here.
STORE_BYTES = 80 << 20
COMMAND_TIMEOUT_S = 240.0


class OnRay:
    """Nodes, of which the first is this program's, and a connection to them.

    Attributes:
        nodes: what adds and removes nodes.
        directory: where the actors make their private directories.
        cluster: what the commands use.
    """

    def __init__(self, nodes: Nodes, directory: Path) -> None:
        self.nodes = nodes
        self.directory = directory
        self.cluster = Cluster(nodes.address, "nanovllm")
        self._number = 1

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Begins a command of `nanovllm-ray`, whose output is one pipe."""
        return subprocess.Popen(
            [sys.executable, "-m", "nanovllm.ray.cli", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"RAY_ADDRESS": self.nodes.address, KEYS_VARIABLE: ""},
        )

    def command(self, *words: str) -> str:
        """What a command of `nanovllm-ray` prints. Raises RuntimeError if it fails."""
        process = self.start(*words)
        printed, _ = process.communicate(timeout=COMMAND_TIMEOUT_S)
        if process.returncode:
            raise RuntimeError(printed)
        return printed

    def add_node(self, cpus: int, gpus: int = 0) -> None:
        """A node with an address of its own; its GPUs need not be there."""
        self._number += 1
        with patch.dict(os.environ, TMPDIR=str(self.directory)):
            self.nodes.add_node(
                num_cpus=cpus,
                num_gpus=gpus,
                object_store_memory=STORE_BYTES,
                node_ip_address=f"127.0.0.{self._number}",
            )


@contextlib.contextmanager
def on_ray(cpus: Sequence[int]) -> Iterator[OnRay]:
    """A node with so many CPUs, as Ray counts them, for each of `cpus`."""
    with tempfile.TemporaryDirectory(prefix="nv-") as directory:
        first = {"num_cpus": cpus[0], "object_store_memory": STORE_BYTES}
        with patch.dict(os.environ, TMPDIR=directory):
            nodes = Nodes(True, head_node_args=first | {"include_dashboard": False})
        try:
            running = OnRay(nodes, Path(directory))
            for count in cpus[1:]:
                running.add_node(count)
            yield running
        finally:
            ray.shutdown()
            nodes.shutdown()
