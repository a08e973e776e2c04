"""Every command of docs/http.md, and of the README over HTTP, run as it stands."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.http.server import Server

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "docs" / "http.md").read_text() + (ROOT / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"
COMMANDS = [
    (language, code)
    for language, code in re.findall(
        r"^```(sh|python|console)\n(.*?)^```$", PAGES, re.DOTALL | re.MULTILINE
    )
    if language != "console" and ADDRESS in code
]


@pytest.mark.parametrize(("language", "code"), COMMANDS)
def test_a_command_of_the_page(server: Server, language: str, code: str) -> None:
    if language == "sh" and shutil.which("curl") is None:
        pytest.skip("curl is missing")
    program = ["sh", "-e"] if language == "sh" else [sys.executable, "-"]
    ran = subprocess.run(
        program,
        input=code.replace(ADDRESS, server.url).replace("Qwen3-0.6B", "demo"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "error" not in ran.stdout
    assert len(ran.stdout) > 20
