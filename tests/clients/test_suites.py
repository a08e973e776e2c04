"""Programs that check an API, run before a server."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.support.pipeline import Pipeline
from tests.http.server import Server, serving

# What is wrong with an answer, whatever was asked. That a request which the schema allows is
# accepted is not among them: a schema cannot say which tokens there are.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)


def installed(program: str) -> str:
    found = shutil.which(program, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"{program} is missing")
    return found


@pytest.mark.parametrize(
    ("form", "passes"), [("openai-chat", 7), ("open-responses", 11), ("anthropic", 7)]
)
def test_llm_comply(obedient: Server, form: str, passes: int) -> None:
    ran = subprocess.run(
        [
            installed("llm-comply"),
            *("--format", form, "--base-url", f"{obedient.url}/v1"),
            *("--api-key", "none", "--model", "demo"),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    failed = [line.split()[1:3] for line in ran.stdout.splitlines() if "✗" in line]
    assert failed == [["Image", "Input"]], ran.stdout
    assert ran.stdout.count("✓") >= passes


@pytest.mark.timeout(600)
def test_schemathesis(start_pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    """Outputs are short: some requests ask for as much as there may be, 128 times."""
    schemathesis = installed("schemathesis")
    running = start_pipeline("", "--device", "sim", "--max-model-len", "64")
    with serving(running.endpoint) as server:
        check(schemathesis, server, tmp_path)
        assert server.chat(max_tokens=1).status == 200


def check(schemathesis: str, server: Server, directory: Path) -> None:
    ran = subprocess.run(
        [
            schemathesis,
            *("run", f"{server.url}/openapi.json", "--checks", ",".join(CHECKS)),
            *("--max-examples", "50", "--request-timeout", "30", "--seed", "1"),
        ],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
