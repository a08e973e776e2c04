"""docs/operations.md: its example serves, and every command does what the page says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.support.pipeline import READY_TIMEOUT_S, Pipeline
from nanovllm.settings import DEFAULT_INGRESS
from tests.readers import free_tcp_endpoint

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
BLOCKS = re.findall(r"^```(toml|sh)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_page_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(BLOCKS) == PAGE.count("```") / 2
    command = tmp_path / "nanovllm"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m nanovllm "$@"\n')
    command.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    endpoint = free_tcp_endpoint()

    def run(block: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-e"],
            input=block.replace(DEFAULT_INGRESS, endpoint),
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
    made = run(make_keys)
    assert made.returncode == 0, made.stderr
    file = tmp_path / "pipeline.toml"
    file.write_text(example.replace('"Qwen/Qwen3-0.6B"', '""'))
    here = ("--ingress", endpoint, "--http", "127.0.0.1:0", "--device", "sim")
    with Pipeline("", "--config", str(file), *here) as running:
        monkeypatch.setenv("NANOVLLM_RUNTIME_DIR", str(running.runtime_dir))
        engines = [s.engine for s in running.status().services if s.role == "scheduler"]
        assert engines == [0, 1]
        assert json.loads(running.output[0])["service"], "the log is JSON"
        for kind, block in BLOCKS:
            if kind == "sh" and block != make_keys:
                ran = run(block)
                assert ran.returncode == 0, (block, ran.stderr)
            if block == take_back:
                refused = run(use_key)
                assert refused.returncode == 1
                assert "does not take this client's key" in refused.stderr
        services = running.status().services
        assert all(service.restarts == 1 for service in services)
        assert sum(service.role == "detokenizer" for service in services) == 2
