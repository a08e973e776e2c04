"""docs/python.md: every example is run, and prints what the page says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.support.pipeline import Pipeline
from nanovllm.settings import DEFAULT_INGRESS

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
# A program, and the output that the page shows below it, if it does.
EXAMPLES = re.findall(r"```python\n(.*?)```\n(?:```text\n(.*?)```)?", PAGE, flags=re.DOTALL)


def test_the_page_has_examples() -> None:
    assert len(EXAMPLES) == PAGE.count("```python") >= 8


@pytest.mark.parametrize(("program", "output"), EXAMPLES)
def test_an_example_runs(program: str, output: str, pipeline: Pipeline) -> None:
    program = program.replace(DEFAULT_INGRESS, pipeline.endpoint)
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    said = ".*".join(map(re.escape, output.split("…"))) if output else ".+"
    assert re.fullmatch(said, ran.stdout, flags=re.DOTALL), ran.stdout
