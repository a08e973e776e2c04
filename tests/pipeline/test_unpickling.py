"""Nothing is ever unpickled, in no service."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.support.pipeline import Pipeline
from tests.pipeline.leftovers import wait_until_nothing_is_left
from tests.pipeline.wire import Wire

HOOK = Path(__file__).parents[1] / "audit"
SERVICE = re.compile(r"nanovllm\.services\.(\w+) --index (\d+)")
ARGUMENTS = """--device cpu --tp 2 --tokenizers 2 --detokenizers 2 --max-model-len 256
 --kvcache-block-size 16 --num-kvcache-blocks 48 --max-num-batched-tokens 128 --max-num-seqs 16"""
SERVICES = [
    *(("ingress", 0), ("scheduler", 0), ("tokenizer", 0), ("tokenizer", 1)),
    *(("detokenizer", 0), ("detokenizer", 1), ("gpu_worker", 0), ("gpu_worker", 1)),
]


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory in which all processes that start from now on write what they unpickle."""
    monkeypatch.setenv("NANOVLLM_TEST_AUDIT", str(tmp_path))
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{HOOK}{os.pathsep}{before}" if before else str(HOOK))
    return tmp_path


def test_an_unpickled_class_is_written_down(records: Path) -> None:
    program = "import datetime, pickle; pickle.loads(pickle.dumps(datetime.date(2024, 1, 1)))"
    subprocess.run([sys.executable, "-c", program], check=True)
    (record,) = records.iterdir()
    command, found = record.read_text().splitlines()
    assert "datetime.date(2024" in command
    assert found.startswith("('datetime', 'date')")


def test_no_service_unpickles_anything(records: Path) -> None:
    """From start to end, with every kind of request, two deaths, and pickles from a client."""
    with Pipeline("", *ARGUMENTS.split()) as pipeline, Wire(pipeline.endpoint) as wire:
        answers = wire.ask_all(
            [
                *({"prompt_token_ids": [n] * 60, "sampling": {"logprobs": 3}} for n in range(8)),
                {"prompt": "Once upon a time", "sampling": {"stop": ["z"], "seed": 1}},
                {"messages": [{"role": "user", "content": "hello"}], "cache_salt": "s"},
                {"prompt": "x", "stream": False, "resume_token_ids": [5, 6]},
                {"prompt": "x", "sampling": {"max_tokens": 200, "ignore_eos": True}},
            ]
        )
        wire.abort(answers[-1])
        wire.send(pickle.dumps(Path("x")))
        wire.until(lambda: answers[0].deltas)
        for service in pipeline.status().services:
            if service.role == "scheduler" or (service.role, service.index) == ("gpu_worker", 1):
                os.kill(service.pid, signal.SIGKILL)
        wire.results(*answers)
        wire.until(lambda: wire.refused)
        wait_until_nothing_is_left(pipeline)
    lives: Counter[tuple[str, int]] = Counter()
    for record in records.iterdir():
        command, *unpickled = record.read_text().splitlines()
        assert unpickled == [], command
        if match := SERVICE.search(command):
            lives[match[1], int(match[2])] += 1
    twice = [("scheduler", 0), ("gpu_worker", 0), ("gpu_worker", 1)]
    assert lives == dict.fromkeys(SERVICES, 1) | dict.fromkeys(twice, 2)
