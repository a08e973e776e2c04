"""The launcher as a process: it comes up, explains mistakes, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.support.pipeline import (
    END_TIMEOUT_S,
    LOOK_AGAIN_S,
    READY_TIMEOUT_S,
    Pipeline,
)
from nanovllm.checkpoint import DEMO_CHECKPOINT
from nanovllm.launch.cli import _announce
from nanovllm.names import ServiceId
from nanovllm.settings import DEFAULT_INGRESS, Settings, default_runtime_dir

SIM = ("--device", "sim", "--sim-step-ms", "1")
ROLES = ("ingress", "tokenizer", "scheduler", "gpu_worker", "detokenizer")
# They import NumPy.
COMPUTE = ("tokenizer", "scheduler", "gpu_worker")


@pytest.fixture
def sim() -> Iterator[Pipeline]:
    with Pipeline("", *SIM, lifeline=False) as running:
        yield running


@pytest.fixture(scope="module")
def shared() -> Iterator[Pipeline]:
    """For tests after which it serves as before."""
    with Pipeline("", *SIM) as running:
        yield running


def services(pipeline: Pipeline) -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process(pipeline.process.pid).children(recursive=True)
    return found


def role_of(process: psutil.Process) -> str:
    command: list[str] = process.cmdline()
    return next(word.split(".")[-1] for word in command if ".services." in word)


def gone(processes: list[psutil.Process], within_s: float) -> bool:
    return not psutil.wait_procs(processes, timeout=within_s)[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_and_leaves_nothing(sim: Pipeline, number: signal.Signals) -> None:
    running = services(sim)
    assert sorted(role_of(process) for process in running) == sorted(ROLES)
    sim.process.send_signal(number)
    assert sim.process.wait(END_TIMEOUT_S) == 0
    sim.wait_for("stopping", END_TIMEOUT_S)
    assert gone(running, 0)
    assert not sim.runtime_dir.exists()
    assert "draining" not in sim.transcript, "nothing was unfinished"


def test_a_killed_launcher_takes_its_services_along(sim: Pipeline) -> None:
    running = services(sim)
    for process in running[::2]:
        process.suspend()
    sim.process.kill()
    assert gone(running, END_TIMEOUT_S)
    again = Pipeline("", *SIM, "--runtime-dir", str(sim.runtime_dir))
    again.start().stop()


def test_a_service_that_dies_is_named_and_comes_back(shared: Pipeline) -> None:
    for role in ROLES:
        next(process for process in services(shared) if role_of(process) == role).kill()
        shared.wait_for(f"supervisor | {ServiceId(role)} was killed by SIGKILL", END_TIMEOUT_S)
        shared.wait_for(f"{ServiceId(role)} | ready", END_TIMEOUT_S)
    assert [service.restarts for service in shared.status().services] == [1] * len(ROLES)


def test_services_log_with_their_names_in_front(shared: Pipeline) -> None:
    assert any(" gpu_worker 0.0 | " in line for line in shared.output)


def refused(*arguments: str) -> str:
    """Launches what must be refused; the error's line."""
    if "--http" not in arguments:
        arguments = ("--http", "", *arguments)
    done = subprocess.run(
        [sys.executable, "-m", "nanovllm.launch.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=READY_TIMEOUT_S,
        check=False,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    *before, last = done.stderr.strip().splitlines()
    reason = last.rpartition(": ")[2]
    assert not any(reason in line for line in before), "it is said once"
    return last


def config(directory: Path, **changes: object) -> Path:
    shape = json.loads((DEMO_CHECKPOINT / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**shape, **changes}))
    return directory


def test_mistakes_get_one_clear_line(tmp_path: Path) -> None:
    private = ("--runtime-dir", str(tmp_path / "run"), "--ingress", "")
    assert "no such model: ./nothing" in refused("./nothing", *private)
    llama = config(tmp_path, model_type="llama")
    assert "only dense 'qwen2' and 'qwen3' are served" in refused(str(llama), *private)
    assert "--tp 3 does not divide" in refused("--tp", "3", *private)
    assert "--num-kvcache-blocks is 0" in refused("--num-kvcache-blocks", "0", *private)
    assert "--device" in refused("--device", "abacus", *private)
    small = ("--kvcache-block-size", "16", "--num-kvcache-blocks", "8", *SIM)
    assert "not enough memory for one sequence" in refused(*small, *private)
    line = refused(*SIM, *private, "--ingress", "tcp://*:5560")
    assert "--insecure" in line
    line = refused(*SIM, *private, "--ingress", "nowhere")
    assert "--ingress nowhere: must be tcp://HOST:PORT" in line
    no_tokenizer = config(tmp_path)
    assert f"{no_tokenizer} has no tokenizer.json" in refused(
        str(no_tokenizer), *SIM, *private, "--ingress", ""
    )
    missing = f"ipc://{tmp_path}/missing/x"
    line = refused(*SIM, *private, "--ingress", missing)
    assert f"--ingress {missing} cannot be bound: No such file or directory" in line


def test_a_taken_endpoint_and_a_taken_runtime_dir_are_named(
    shared: Pipeline,
) -> None:
    line = refused("--runtime-dir", str(shared.runtime_dir), "--ingress", "", *SIM)
    assert f"--runtime-dir {shared.runtime_dir} is in use" in line
    with socket.create_server(("127.0.0.1", 0)) as held:
        endpoint = f"tcp://127.0.0.1:{held.getsockname()[1]}"
        other = str(shared.runtime_dir) + "-2"
        line = refused("--runtime-dir", other, "--ingress", endpoint, *SIM)
        assert f"--ingress {endpoint} is taken by another process" in line
        assert not os.path.exists(other)


def tried(pipeline: Pipeline, **environment: str) -> None:
    """Runs the commands that the launcher proposes, except for the chat."""
    said = [line.removeprefix("try:").strip() for line in pipeline.output if "nanovllm " in line]
    (generate,) = [line for line in said if " generate " in line]
    (status,) = [line for line in said if " status" in line]
    for command in (f"{generate} --max-tokens 3", status):
        ran = subprocess.run(
            command,
            shell=True,
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        )
        assert ran.returncode == 0, (command, ran.stderr)


@pytest.fixture
def no_nanovllm_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


@pytest.mark.usefixtures("no_nanovllm_on_path")
def test_the_commands_that_the_launcher_proposes_work(sim: Pipeline) -> None:
    sim.wait_for(" status", END_TIMEOUT_S)
    tried(sim)


def test_every_interface_is_announced_as_it_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="nv-") as base:
        monkeypatch.setenv("XDG_RUNTIME_DIR", base)
        arguments = ("--ingress", f"tcp://*:{port}", "--insecure", "--runtime-dir")
        with Pipeline("", *SIM, *arguments, default_runtime_dir()) as pipeline:
            assert f"whoever reaches tcp://*:{port} may use the pipeline" in pipeline.transcript
            line = pipeline.wait_for(" status", END_TIMEOUT_S)
            assert line.endswith(f" status --endpoint tcp://127.0.0.1:{port}")
            tried(pipeline)


def test_the_announcement_has_the_served_name(capsys: pytest.CaptureFixture[str]) -> None:
    _announce(Settings(served_model_name="other"), "demo", None)
    assert "serves other at " in capsys.readouterr().out


@pytest.mark.parametrize("variable", ["NANOVLLM_ENDPOINT", "NANOVLLM_RUNTIME_DIR"])
def test_proposals_hold_though_the_environment_names_another_pipeline(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _announce(Settings(), "demo", None)
    assert " chat\n" in capsys.readouterr().out
    monkeypatch.setenv(variable, "elsewhere")
    _announce(Settings(), "demo", None)
    assert f" chat --endpoint {DEFAULT_INGRESS}\n" in capsys.readouterr().out


def test_every_service_can_be_started_alone_explains_itself_and_loads_little() -> None:
    for role in ROLES:
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", f"nanovllm.services.{role}", "--help"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        assert "--pipeline-depth" in done.stdout
        loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "zmq" in loaded
        heavy = {"torch", "asyncio"} if role in COMPUTE else {"torch", "asyncio", "numpy"}
        assert not loaded & heavy, f"{role} starts slowly"


def test_ctrl_c_while_it_starts_ends_it_too() -> None:
    pipeline = Pipeline("", "--device", "cpu")
    process = pipeline.launch()
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not (running := psutil.Process(process.pid).children()):
        assert time.monotonic() < deadline
        time.sleep(LOOK_AGAIN_S)
    process.send_signal(signal.SIGINT)
    assert process.wait(END_TIMEOUT_S) == 0
    assert gone(running, 0)
