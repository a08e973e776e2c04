from __future__ import annotations

import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest


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
