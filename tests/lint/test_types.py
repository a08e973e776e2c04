"""mypy, beside other tests: without a cache it takes half a minute."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


@pytest.mark.timeout(660)
def test_the_code_is_type_annotated_throughout() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "mypy"],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout
