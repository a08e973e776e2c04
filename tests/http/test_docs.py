"""Every command of docs/http.md, run as it stands."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.http.server import Server

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "http.md").read_text()
COMMANDS = re.findall(r"^```(sh|python)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
ADDRESS = "http://127.0.0.1:8000"


@pytest.mark.parametrize(("language", "code"), COMMANDS)
def test_a_command_of_the_page(server: Server, language: str, code: str) -> None:
    if language == "sh" and shutil.which("curl") is None:
        pytest.skip("curl is missing")
    assert ADDRESS in code
    program = ["sh", "-e"] if language == "sh" else [sys.executable, "-"]
    ran = subprocess.run(
        program,
        input=code.replace(ADDRESS, server.url),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "error" not in ran.stdout
    assert len(ran.stdout) > 20
