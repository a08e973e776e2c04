"""The wheel, installed beside its dependencies: type checkers see its types, and it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nanovllm

TREE = Path(nanovllm.__file__).parents[1]

GOOD = """
import dataclasses
import json
from typing import assert_type

from nanovllm import LLM, AsyncClient, Client, Completion, Delta, LLMOutput, SamplingParams

def offline() -> list[LLMOutput]:
    with LLM("model", tensor_parallel_size=2, dtype="bfloat16", enforce_eager=True) as llm:
        return llm.generate(["a", [1, 2]], SamplingParams(max_tokens=3))

def online(client: Client) -> str:
    for delta in client.generate("a", stream=True):
        assert_type(delta, Delta)
    completion = client.chat([{"role": "user", "content": "hi"}])
    assert_type(completion, Completion)
    return json.dumps(dataclasses.asdict(completion))

async def both(client: AsyncClient) -> int:
    completion = await client.generate("a", SamplingParams(temperature=0.0))
    return completion.usage.completion_tokens
"""
BAD = """
from nanovllm import LLM, Client
LLM("model", max_sequences=3)
LLM("model", dtype="fp16")
Client().generate("a").txt
"""
# To read these packages, which are not under test, takes mypy half a minute.
MYPY = """
[mypy]
strict = true
[mypy-torch.*,transformers.*,matplotlib.*]
follow_imports = skip
"""


@pytest.fixture
def installed(python: Path, tmp_path: Path) -> str:
    """A Python that has the wheel of this tree."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=TREE, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", "--no-deps", "--quiet", str(wheel)], check=True)
    return str(python)


def test_mypy_sees_the_types_of_the_wheel(
    installed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str) -> list[str]:
        ran = subprocess.run([installed, *arguments], cwd=tmp_path, stdout=subprocess.PIPE)
        return ran.stdout.decode().splitlines()

    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.delenv("MYPYPATH", raising=False)
    (where,) = run("-c", "import nanovllm.services.ingress as i; print(i.__file__)")
    assert where.startswith(str(tmp_path)), "it is the wheel that is looked at"
    page = Path(where).parents[1] / "http" / "page" / "static"
    assert (page / "index.html").exists(), "the page's files are not in the wheel"
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(BAD)
    (tmp_path / "mypy.ini").write_text(MYPY)
    told = run("-m", "mypy", "--cache-dir", os.devnull, "good.py", "bad.py")
    errors = [line.partition(" error: ")[0] for line in told if " error: " in line]
    assert errors == ["bad.py:3:", "bad.py:4:", "bad.py:5:"], told
