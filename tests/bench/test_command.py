"""`nanovllm bench` as a process, against real pipelines."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.support.pipeline import Pipeline
from nanovllm.bench.cli import bench
from nanovllm.exit_codes import EXIT_INTERRUPTED
from tests.terminal import CTRL_C, terminal

TIMEOUT_S = 60.0
QUICK = ["--input", "8", "--output", "4", "--warm-up", "0"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "nanovllm", "bench", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def told(stderr: str) -> str:
    """Without the warnings, which a busy machine gives cause for."""
    return "".join(line for line in stderr.splitlines(True) if not line.startswith("Warning: "))


def test_a_run_shows_a_table_and_writes_everything(pipeline: Pipeline, tmp_path: Path) -> None:
    written = [str(tmp_path / name) for name in ("run.json", "run.png")]
    ran = run(
        *("--endpoint", pipeline.endpoint, "--concurrency", "3", "--requests", "7", *QUICK),
        *("--turns", "2", "--json", written[0], "--plot", written[1], "--seed", "5"),
    )
    assert (ran.returncode, told(ran.stderr)) == (0, "")
    assert "14 sent, 14 finished (14 length)" in ran.stdout
    assert re.search(r"time to first token +\d", ran.stdout)
    assert Path(written[1]).read_bytes().startswith(b"\x89PNG")
    found = json.loads(Path(written[0]).read_bytes())
    assert found["model"] == "demo"
    assert found["device"].startswith(("cpu", "NVIDIA"))
    assert found["work"]["seed"] == 5
    assert found["work"]["input"] == [8, 8]
    assert [entry["output_tokens"] for entry in found["requests"]] == [4] * 14
    assert found["report"]["tokens"] == {
        "input": 7 * 8 + 7 * 20,
        "cached": 0,
        "output": 56,
        "cached_share": 0.0,
    }


def test_prompts_and_arrivals_from_files(pipeline: Pipeline, tmp_path: Path) -> None:
    trace, prompts = tmp_path / "trace", tmp_path / "prompts"
    trace.write_text('{"at_s": 0.2, "output": 2}\n{"at_s": 0, "output": 3}\n{"at_s": 0.1}\n')
    prompts.write_text('{"prompt": "Once"}\n{"messages": [{"role": "user", "content": "Hi"}]}\n')
    document = tmp_path / "run.json"
    arguments = f"--trace {trace} --prompts {prompts} --output 5 --ignore-eos --json {document}"
    ran = run("--endpoint", pipeline.endpoint, *arguments.split())
    assert ran.returncode == 0, ran.stderr
    entries = json.loads(document.read_bytes())["requests"]
    assert [entry["output_tokens"] for entry in entries] == [3, 5, 2]
    assert [entry["due_s"] for entry in entries] == [0.0, 0.1, 0.2]
    assert all(entry["sent_s"] >= entry["due_s"] for entry in entries)


def test_errors_are_counted_by_code(pipeline: Pipeline) -> None:
    arguments = ["--input", "50000", "--output", "4", "--warm-up", "0", "--requests", "2"]
    ran = run("--endpoint", pipeline.endpoint, *arguments)
    assert ran.returncode == 1
    assert "2 requests: context_length_exceeded" in ran.stdout
    (line,) = told(ran.stderr).splitlines()
    assert line.startswith("Error: no request succeeded: context_length_exceeded: ")


def test_ctrl_c_shows_what_there_is(pipeline: Pipeline) -> None:
    """On a terminal, whose bar tells when the run is under way."""
    words = command("--endpoint", pipeline.endpoint, "--seconds", "100", *QUICK)
    with terminal(words) as running:
        running.wait_for("first token")
        running.press(CTRL_C)
        assert running.wait() == 130
        assert "Traceback" not in running.shown
        assert re.search(r"time to first token +\d", running.shown)
        assert "interrupted" in running.shown


def test_a_server_that_dies_is_told_in_a_line(start_pipeline: Callable[..., Pipeline]) -> None:
    server = start_pipeline("", "--device", "sim", "--sim-step-ms", "5")
    running = subprocess.Popen(
        command("--endpoint", server.endpoint, "--seconds", "100", *QUICK),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not server.reported().scheduler.generated:
        continue
    for service in server.status().services:
        if service.role == "ingress":
            os.kill(service.pid, signal.SIGKILL)
    output, errors = running.communicate(timeout=TIMEOUT_S)
    assert running.returncode == 1
    assert told(errors) == (
        f"Error: the pipeline at {server.endpoint} is gone: the connection has ended\n"
    )
    assert re.search(r"time to first token +\d", output)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--endpoint ipc:///nowhere/ingress.sock", "no pipeline answers at ipc:///nowhere"),
        ("--prompts /nowhere", "cannot read /nowhere: No such file or directory"),
        (f"--prompts {__file__}", f"{__file__}, line 1: "),
        (f"--trace {__file__}", f"{__file__}, line 1: "),
        ("--json /nowhere/run.json", "cannot write /nowhere/run.json"),
        ("--rate 1 --concurrency 1", "--concurrency and --rate exclude one another"),
        ("--input 5:3", "'5:3': give at least 1, and the shorter one first"),
        ("--temperature 11", "temperature=11.0: Expected `float` <= 10.0"),
        ("--rate inf", "'inf' is not a finite number"),
        ("--warm-up nan", "'nan' is not a finite number"),
        ("--input 99999999999999999999", "'99999999999999999999': give at most 10000000"),
        ("--seed -1", "-1 is not in the range x>=0"),
        ("--prompts file --shared-prefix 3", "--shared-prefix is for random prompts"),
        ("--prefixes 3", "--prefixes needs --shared-prefix"),
        ("--plot run.doc", "--plot run.doc: give it one of the endings "),
    ],
)
def test_a_mistake_is_told_in_a_line(arguments: str, says: str) -> None:
    ran = CliRunner().invoke(bench, arguments.split())
    assert isinstance(ran.exception, SystemExit)
    assert ran.exit_code in (1, 2)
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("Error: ")]
    assert says in line


def test_what_is_written_needs_no_reader_of_the_table(pipeline: Pipeline, tmp_path: Path) -> None:
    document, picture = tmp_path / "run.json", tmp_path / "run.png"
    reader, stdout = os.pipe()
    os.close(reader)
    written = ("--json", str(document), "--plot", str(picture))
    ran = subprocess.run(
        command("--endpoint", pipeline.endpoint, "--requests", "2", *QUICK, *written),
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    os.close(stdout)
    assert "Traceback" not in ran.stderr
    assert json.loads(document.read_bytes())["work"]["top_k"] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_full_disk_is_told_with_the_files_name(pipeline: Pipeline) -> None:
    ran = run("--endpoint", pipeline.endpoint, "--requests", "1", *QUICK, "--json", "/dev/full")
    assert ran.returncode == 1
    assert told(ran.stderr) == "Error: cannot write /dev/full: No space left on device\n"
    assert "time to first token" in ran.stdout


def test_neither_a_narrow_terminal_nor_its_encoding_cuts_figures(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    ran = run("--endpoint", pipeline.endpoint, "--requests", "2", *QUICK)
    assert (ran.returncode, told(ran.stderr)) == (0, "")
    assert len(re.findall(r"\d+\.\d\d", next(re.finditer("time to first.*", ran.stdout))[0])) == 5
    assert "s a token" in ran.stdout


def test_ctrl_c_ends_it_also_while_it_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    class CtrlC(MetaPathFinder):
        def find_spec(self, name: str, *_: object) -> None:
            if name == "nanovllm.bench.command":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "nanovllm.bench.command", raising=False)
    monkeypatch.setattr(sys, "meta_path", [CtrlC(), *sys.meta_path])
    assert CliRunner().invoke(bench, []).exit_code == EXIT_INTERRUPTED
