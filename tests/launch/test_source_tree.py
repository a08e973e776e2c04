"""A source tree on PYTHONPATH runs as an installed package does."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import nanovllm
from benchmarks.support.pipeline import Pipeline
from nanovllm import Client, SamplingParams

TREE = Path(nanovllm.__file__).parents[1]
FIND_METADATA = "from importlib.metadata import version; version('nanovllm')"


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A Python that has what this one has, but for nanovllm."""
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    find = "import sysconfig; print(sysconfig.get_path('purelib'))"
    there = Path(subprocess.check_output([python, "-c", find], text=True).strip())
    for directory in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(directory).iterdir():
            if "nanovllm" not in entry.name and entry.suffix != ".pth":
                (there / entry.name).symlink_to(entry)
    return python


def test_it_needs_no_package_metadata(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TREE))
    monkeypatch.setattr(sys, "executable", str(python))
    found = subprocess.run([python, "-c", FIND_METADATA], capture_output=True, text=True)
    assert "PackageNotFoundError" in found.stderr, "what this test is about"
    with Pipeline("", "--device", "sim") as pipeline, Client(pipeline.endpoint) as client:
        done = client.generate([5], SamplingParams(max_tokens=3, ignore_eos=True))
        assert len(done.token_ids) == 3
        assert pipeline.status().services
