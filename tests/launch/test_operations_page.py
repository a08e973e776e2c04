"""docs/operations.md: its example serves, and every command does what the page says."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.support.pipeline import END_TIMEOUT_S, LOOK_AGAIN_S, READY_TIMEOUT_S, Pipeline
from nanovllm import Client, SamplingParams
from nanovllm.settings import DEFAULT_INGRESS
from tests.machines.ports import free_services
from tests.readers import free_tcp_endpoint

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
# Where another machine joins, and the addresses of the new pipeline beside the old one.
SERVICES = "tcp://10.0.0.1:5600"
NEW = ("tcp://127.0.0.1:5556", "tcp://127.0.0.1:8001")
BLOCKS = re.findall(r"^```(toml|sh)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing")
def test_the_page_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(BLOCKS) == PAGE.count("```") / 2
    for name, module in (("nanovllm", "nanovllm"), ("nanovllm-launch", "nanovllm.launch.cli")):
        command = tmp_path / name
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m {module} "$@"\n')
        command.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    endpoint, *others = (free_tcp_endpoint() for _ in range(3))
    addresses = dict(zip((DEFAULT_INGRESS, *NEW), (endpoint, *others), strict=True))
    addresses[SERVICES] = free_services()

    def run(block: str) -> subprocess.CompletedProcess[str]:
        for written, used in addresses.items():
            written, used = (text.removeprefix("tcp://") for text in (written, used))
            block = block.replace(written, used)
        return subprocess.run(
            ["sh", "-e"],
            input=block,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=READY_TIMEOUT_S,
            check=False,
        )

    ((_, example),) = [block for block in BLOCKS if block[0] == "toml"]
    (make_keys,) = [block for _, block in BLOCKS if "nanovllm keygen" in block]
    (take_back,) = [block for _, block in BLOCKS if block.startswith("rm ")]
    (use_key,) = [block for _, block in BLOCKS if "nanovllm generate" in block]
    (join,) = [block for _, block in BLOCKS if "--join" in block]
    (take_over,) = [block for _, block in BLOCKS if "kill -TERM" in block]
    made = run(make_keys)
    assert made.returncode == 0, made.stderr
    file = tmp_path / "pipeline.toml"
    file.write_text(example.replace('"Qwen/Qwen3-0.6B"', '""') + 'device = "sim"\n')
    here = ("--ingress", endpoint, "--http", "127.0.0.1:0", "--services", addresses[SERVICES])
    with Pipeline("", "--config", str(file), *here) as running:
        monkeypatch.setenv("NANOVLLM_RUNTIME_DIR", str(running.runtime_dir))
        engines = [s.engine for s in running.status().services if s.role == "scheduler"]
        assert engines == [0, 1]
        assert json.loads(running.output[0])["service"], "the log is JSON"
        for kind, block in BLOCKS:
            if kind == "sh" and block not in (make_keys, join, take_over):
                ran = run(block)
                assert ran.returncode == 0, (block, ran.stderr)
            if block == take_back:
                refused = run(use_key)
                assert refused.returncode == 1
                assert "does not take this client's key" in refused.stderr
        services = running.status().services
        assert all(service.restarts == 1 for service in services)
        assert sum(service.role == "detokenizer" for service in services) == 2
        with ended(tmp_path / "joined.pid"):
            ran = run(join.replace("--engines 1", "--engines 1 --device sim"))
            assert ran.returncode == 0, ran.stderr
            wait_until_joined(running, tmp_path / "joined.log")
        monkeypatch.setenv("OLD", str(running.process.pid))
        with Client(running.endpoint) as client, ended(tmp_path / "new.pid"):
            stream = client.generate("Once", SamplingParams(max_tokens=2000), stream=True)
            next(stream)
            ran = run(take_over)
            assert ran.returncode == 0, ran.stderr
            with Client(f"ipc://{tmp_path}/new/ingress.sock") as another:
                assert another.generate("Once", SamplingParams(max_tokens=3)).token_ids
            assert stream.result().finish_reason in ("stop", "length")
            assert running.process.wait(END_TIMEOUT_S) == 0


@contextlib.contextmanager
def ended(pid: Path) -> Iterator[None]:
    """Ends the process that the file names, if it is there by then."""
    try:
        yield
    finally:
        if pid.exists():
            os.kill(int(pid.read_text()), signal.SIGTERM)


def wait_until_joined(pipeline: Pipeline, log: Path) -> None:
    """Returns when a worker of another machine is ready."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        services = pipeline.status().services
        if any(s.machine and s.role == "gpu_worker" and s.state == "ready" for s in services):
            return
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(LOOK_AGAIN_S)
