"""A source tree on PYTHONPATH runs as an installed package does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import nanovllm
from benchmarks.support.pipeline import Pipeline
from nanovllm import Client, SamplingParams

TREE = Path(nanovllm.__file__).parents[1]
FIND_METADATA = "from importlib.metadata import version; version('nanovllm')"


def test_it_needs_no_package_metadata(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TREE))
    monkeypatch.setattr(sys, "executable", str(python))
    found = subprocess.run([python, "-c", FIND_METADATA], capture_output=True, text=True)
    assert "PackageNotFoundError" in found.stderr, "what this test is about"
    with Pipeline("", "--device", "sim") as pipeline, Client(pipeline.endpoint) as client:
        done = client.generate([5], SamplingParams(max_tokens=3, ignore_eos=True))
        assert len(done.token_ids) == 3
        assert pipeline.status().services
