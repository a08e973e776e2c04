"""A pipeline over five machines, each with a network namespace of its own."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.support.pipeline import LOOK_AGAIN_S, Pipeline
from nanovllm.client.control import Control
from nanovllm.control import ServiceStatus
from nanovllm.keys import make_keys
from tests.machines.network import Host, Network
from tests.recovery.streams import TIMEOUT_S

PORT = 5600
# What the machines beside that of the ingress bring. The ingress's has a detokenizer.
BRING = (
    ("--engines", "1", "--detokenizers", "1"),
    ("--engines", "1"),
    ("--tokenizers", "2", "--detokenizers", "1"),
    ("--tokenizers", "1"),
)
SERVICES = sum(map(int, (word for words in BRING for word in words[1::2]))) + 2 + 2


class Machines(NamedTuple):
    """The pipeline of the ingress, and what has joined it; `stranger` is a host without keys."""

    network: Network
    stranger: Host
    main: Pipeline
    joined: list[Pipeline]

    @property
    def status(self) -> list[ServiceStatus]:
        with Control(str(self.main.runtime_dir)) as control:
            return control.status().services

    def wait_until(self, unreachable: bool) -> None:
        """Returns when a machine cannot be reached; or when every service is ready."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            status = self.status
            states = [service.state for service in status]
            if unreachable and "unreachable" in states:
                return
            if not unreachable and states == ["ready"] * SERVICES:
                return
            assert time.monotonic() < deadline, (status, self.main.transcript)
            time.sleep(LOOK_AGAIN_S)


@contextlib.contextmanager
def five_machines(*options: str) -> Iterator[Machines]:
    """The ingress and a detokenizer on the first machine, with these options; on the others what
    they `BRING`. All have the keys that they need.

    Raises:
        RuntimeError: network namespaces cannot be made here; the message says why.
    """
    with contextlib.ExitStack() as stack:
        network = Network(1 + len(BRING) + 1)
        stack.callback(network.close)
        first, *others, stranger = network.hosts
        keys = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_keys(keys / "first", None)
        (keys / "others").mkdir()
        shutil.copy2(keys / "first" / "services.key", keys / "others")
        services = f"tcp://{first.address}:{PORT}"
        where = ("--services", services, "--ingress", f"tcp://{first.address}:5555")
        arguments = (*where, "--keys", str(keys / "first"), "--engines", "0", "--tokenizers", "0")
        main = stack.enter_context(Pipeline("", *arguments, *options, within=first.within))
        join = ("--join", services, "--keys", str(keys / "others"))
        joined = [
            Pipeline("", *join, *brings, within=host.within)
            for host, brings in zip(others, BRING, strict=True)
        ]
        for pipeline in joined:
            stack.enter_context(pipeline)
        running = Machines(network, stranger, main, joined)
        running.wait_until(unreachable=False)
        yield running
