"""The `nanovllm` command: generate and chat against a double of the ingress, status against a
real link of a supervisor's."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from nanovllm import Client
from nanovllm.client import status as status_view
from nanovllm.client.cli import main
from nanovllm.control import (
    DetokenizerStats,
    Done,
    IngressStats,
    Restart,
    Scale,
    SchedulerStats,
    ServiceStatus,
    Status,
    StatusRequest,
    TokenizerStats,
    ToSupervisor,
    WorkerStats,
)
from nanovllm.hints import LAUNCH_HINTS, REQUEST_HINTS
from nanovllm.launch.cli import main as launch
from nanovllm.protocol import Error
from tests.client.double import Answer, answer_in_full, ingress
from tests.peer import Neighbourhood
from tests.terminal import CTRL_C, TIMEOUT_S, terminal


def run(*arguments: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(main, arguments, input=stdin)


def test_generate_streams_the_text() -> None:
    with ingress(answer_in_full) as double:
        ran = run("generate", "hello", "--endpoint", double.endpoint, "--max-tokens", "3")
        assert (ran.exit_code, ran.output) == (0, "<5><6><7>\n")


def test_generate_passes_its_options_on_and_reads_stdin() -> None:
    options = "--temperature 0 --top-k 5 --top-p 0.9 --min-p 0.1 --seed 3 --stop A --stop B"
    with ingress(answer_in_full) as double:
        run("generate", "-", "--endpoint", double.endpoint, *options.split(), stdin="from stdin")
        (sent,) = double.generates
    assert sent.prompt == "from stdin"
    assert sent.sampling.temperature == 0
    assert (sent.sampling.top_k, sent.sampling.top_p, sent.sampling.min_p) == (5, 0.9, 0.1)
    assert (sent.sampling.seed, sent.sampling.stop) == (3, ["A", "B"])


def test_mistakes_are_told_in_one_line() -> None:
    def script(message: Any, session: str) -> Iterator[Answer]:
        yield Error(id=message.id, code="context_length_exceeded", message="too long")

    with ingress(script) as double:
        ran = run("generate", "hello", "--endpoint", double.endpoint)
    assert ran.exit_code == 1
    assert ran.output.strip().splitlines()[-1] == "Error: context_length_exceeded: too long"
    ran = run("generate", "hello", "--top-p", "3")
    assert (ran.exit_code, len(ran.output.splitlines())) == (1, 1)
    assert "top_p" in ran.output
    assert "cannot connect" in run("generate", "hello", "--endpoint", "nowhere").output
    ran = CliRunner().invoke(main, ["generate", "-"], input=b"caf\xe9")
    assert (ran.exit_code, len(ran.output.splitlines())) == (1, 1)
    assert "not valid UTF-8" in ran.output


def test_a_command_names_the_pipeline_that_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm.client.terminal.PATIENCE_S", 0.1)
    patient = functools.partial(Client, timeout=1.0)
    monkeypatch.setattr("nanovllm.client.cli.Client", patient)
    for command in ("generate", "chat"):
        ran = run(command, "hello", "--endpoint", "tcp://127.0.0.1:1")
        first, last = ran.stderr.splitlines()
        assert first == "waiting for a pipeline at tcp://127.0.0.1:1 …"
        assert last.startswith("Error: no pipeline answers")


def test_a_full_disk_is_told_in_one_line() -> None:
    with ingress(answer_in_full) as double, open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "nanovllm.client.cli", "generate", "hello"]
        ran = subprocess.run(
            [*command, "--endpoint", double.endpoint],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (ran.returncode, ran.stderr) == (1, "Error: No space left on device\n")


@pytest.mark.parametrize("command", ["restart", "scale"])
def test_roles_are_listed_once(command: str) -> None:
    usage = run(command, "--help").output.partition("\n\n")[0]
    assert "ROLE" in usage
    assert "detokenizer" not in usage
    assert run(command, "nobody", "1").output.count("'detokenizer'") == 1


def test_summaries_are_whole() -> None:
    assert "..." not in run("--help").output.partition("Commands:")[2]


def test_chat_in_one_shot() -> None:
    with ingress(answer_in_full) as double:
        arguments = ("--endpoint", double.endpoint, "--max-tokens", "2", "--system", "S")
        ran = run("chat", "hello", "--no-thinking", *arguments)
        (sent,) = double.generates
    assert (ran.exit_code, ran.output) == (0, "<0><1>\n")
    assert sent.messages is not None
    assert [(m["role"], m["content"]) for m in sent.messages] == [
        ("system", "S"),
        ("user", "hello"),
    ]
    assert sent.chat_template_kwargs == {"enable_thinking": False}


def test_chat_remembers_what_was_said() -> None:
    with ingress(answer_in_full) as double:
        arguments = ("chat", "--endpoint", double.endpoint, "--max-tokens", "1")
        ran = run(*arguments, stdin="hello\n\nand then?\n")
        last = double.generates[-1]
    assert ran.exit_code == 0
    assert "double at tcp://" in ran.output
    assert last.messages is not None
    assert [m["content"] for m in last.messages] == ["hello", "<0>", "and then?"]


def test_a_line_that_is_no_text_does_not_end_the_chat() -> None:
    with ingress(answer_in_full) as double:
        command = [sys.executable, "-m", "nanovllm.client.cli", "chat"]
        ran = subprocess.run(
            [*command, "--endpoint", double.endpoint, "--max-tokens", "1"],
            env={**os.environ, "PYTHONIOENCODING": "utf-8:surrogateescape"},
            input=b"caf\xe9\nhello\n",
            capture_output=True,
        )
        (sent,) = double.generates
    assert (ran.returncode, len(ran.stderr.splitlines())) == (0, 1)
    assert b"not valid Unicode" in ran.stderr
    assert sent.messages is not None
    assert [m["content"] for m in sent.messages] == ["hello"]


# status -----------------------------------------------------------------------------------------


def a_status(at_s: float, cpu_s: float, busy_s: float) -> Status:
    def service(role: str, pid: int, stats: Any, index: int = 0) -> ServiceStatus:
        return ServiceStatus(role, index, 0, pid, "ready", None, 3725.0, 2, at_s, cpu_s, stats)

    scheduler = SchedulerStats(
        running=3,
        waiting=2,
        records=6,
        blocks_used=40,
        blocks_total=100,
        prompt_tokens=1000,
        cached_tokens=250,
        steps=70,
        generated=900,
        preemptions=1,
        plan_bytes=80,
    )
    services = [
        service("ingress", 11, IngressStats(2, 5, 9)),
        service("scheduler", 12, scheduler),
        service("gpu_worker", 13, WorkerStats(3, 0, 70, busy_s)),
        service("gpu_worker", 14, WorkerStats(3, 0, 70, busy_s), index=1),
        service("tokenizer", 15, TokenizerStats(1, 10)),
        service("detokenizer", 16, DetokenizerStats(3, 900)),
        ServiceStatus("detokenizer", 1, 0, 17, "starting", None, 0.5, 0, 0.0, 0.0, None),
    ]
    return Status("the demo model", "tcp://127.0.0.1:5555", "", services)


def test_the_table_shows_every_service_and_the_engine() -> None:
    shown = status_view.render(a_status(10.0, 1.0, 4.0), a_status(12.0, 1.5, 5.9))
    lines = shown.splitlines()
    assert lines[0] == "the demo model at tcp://127.0.0.1:5555"
    (scheduler,) = [line for line in lines if line.startswith("scheduler 0")]
    assert " ".join(scheduler.split()) == (
        "scheduler 0 12 ready 1 h 2 min 2 25% 3 running, 2 waiting"
    )
    (starting,) = [line for line in lines if line.startswith("detokenizer 1")]
    assert " ".join(starting.split()) == "detokenizer 1 17 starting 0 s 0 -"
    assert "KV blocks     40 of 100 used" in lines
    assert "sequences     3 running, 2 waiting, 6 records" in lines
    assert "prefix cache  25% of 1000 prompt tokens came from it" in lines
    assert [line for line in lines if "device busy" in line] == ["device busy   95%"]


def test_status_prints_a_count_of_one_in_the_singular() -> None:
    def service(role: str, stats: Any) -> ServiceStatus:
        return ServiceStatus(role, 0, 0, 1, "ready", None, 1.0, 0, 1.0, 1.0, stats)

    services = [
        service("ingress", IngressStats(1, 1, 1)),
        service("scheduler", SchedulerStats(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)),
        service("gpu_worker", WorkerStats(1, 1, 1, 1.0)),
        service("tokenizer", TokenizerStats(1, 1)),
        service("detokenizer", DetokenizerStats(1, 1)),
    ]
    status = Status("demo", "tcp://127.0.0.1:5555", "", services)
    assert re.findall(r"\b1 \w+s\b", status_view.render(status, status)) == []


def test_a_reborn_service_has_no_rates_yet() -> None:
    before, now = a_status(10.0, 1.0, 4.0), a_status(12.0, 1.5, 5.9)
    now.services = [msgspec.structs.replace(s, pid=s.pid + 100) for s in now.services]
    assert "device busy   -" in status_view.render(before, now)


@contextlib.contextmanager
def supervisor(asked_for: Callable[[], None] | None = None) -> Iterator[str]:
    """A supervisor that answers with `a_status`, in a thread; its runtime directory. It does a
    command at once; or it calls `asked_for`, and never does it."""
    asked = itertools.count(1)

    def answer(message: Any) -> Status | Done | None:
        if isinstance(message, StatusRequest):
            number = next(asked)
            return a_status(number, 0.5 * number, 0.9 * number)
        if isinstance(message, Restart | Scale):
            if asked_for is None:
                return Done(None, message.number)
            asked_for()
        return None

    def serve() -> None:
        while not stopping.is_set():
            here.play(0.02)

    with Neighbourhood() as here:
        here.binds("supervisor", here.settings.control_endpoint, list[ToSupervisor]).answer = answer
        stopping = threading.Event()
        thread = threading.Thread(target=serve)
        thread.start()
        yield str(here.runtime_dir)
        stopping.set()
        thread.join()


def test_status_asks_the_supervisor() -> None:
    with supervisor() as runtime_dir:
        ran = run("status", "--runtime-dir", runtime_dir)
        assert ran.exit_code == 0
        assert "device busy   90%" in ran.output
        ran = run("status", "--runtime-dir", runtime_dir, "--json")
        shown = json.loads(ran.output)
        assert shown["model"] == "the demo model"
        assert shown["services"][1]["stats"]["blocks_total"] == 100
        assert shown["services"][6]["stats"] is None


def test_commands_tell_what_is_going_on_and_what_was_done() -> None:
    with supervisor() as runtime_dir:
        ran = run("restart", "gpu_worker", "--runtime-dir", runtime_dir)
        assert (ran.stderr, ran.stdout) == ("restarting gpu_worker …\n", "restarted gpu_worker\n")
        ran = run("scale", "tokenizer", "1", "--runtime-dir", runtime_dir)
        assert (ran.stderr, ran.stdout) == ("scaling to 1 tokenizer …\n", "1 tokenizer running\n")


def test_ctrl_c_ends_the_waiting_and_says_that_the_command_goes_on() -> None:
    asked = threading.Event()
    with supervisor(asked.set) as runtime_dir:
        command = (sys.executable, "-m", "nanovllm", "restart", "all")
        with terminal(command, NANOVLLM_RUNTIME_DIR=runtime_dir) as shown:
            assert asked.wait(TIMEOUT_S)
            shown.press(CTRL_C)
            assert shown.wait() == 130
            *_, last = shown.shown.splitlines()
            assert last == "not waited for; it goes on all the same: see `nanovllm status`"


def test_options_and_the_environment_say_which_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    with supervisor() as runtime_dir:
        monkeypatch.setattr("nanovllm.client.where.default_runtime_dir", lambda: runtime_dir)
        served = ("--endpoint", "tcp://127.0.0.1:5555")
        for options in ((), served, ("--endpoint", f"ipc://{runtime_dir}/ingress.sock")):
            assert "the demo model" in run("status", *options).output
        ran = run("scale", "tokenizer", "2", "--endpoint", "tcp://127.0.0.1:6666")
        assert f"pipeline in {runtime_dir} serves at tcp://127.0.0.1:5555, not at" in ran.output
        monkeypatch.setenv("NANOVLLM_RUNTIME_DIR", "/nowhere")
        assert "no pipeline runs in /nowhere" in run("status").output
        assert "the demo model" in run("status", *served).output
    with ingress(answer_in_full) as double:
        for variable, value in (("ENDPOINT", double.endpoint), ("RUNTIME_DIR", "/nowhere")):
            monkeypatch.setenv(f"NANOVLLM_{variable}", value)
        assert run("generate", "x", "--max-tokens", "1").output == "<1>\n"
        monkeypatch.setenv("NANOVLLM_ENDPOINT", "nowhere")
        here = ("--endpoint", double.endpoint)
        assert run("generate", "x", "--max-tokens", "1", *here).output == "<1>\n"
        ran = run("generate", "x", "--runtime-dir", "/" + "x" * 200)
        assert "--runtime-dir is too long" in ran.output


@pytest.mark.parametrize("command", ["generate", "chat", "status", "scale", "restart"])
def test_help_names_the_variables(command: str) -> None:
    shown = run(command, "--help").output
    assert "NANOVLLM_ENDPOINT" in shown
    assert "NANOVLLM_RUNTIME_DIR" in shown


def test_options_of_others_get_a_hint() -> None:
    ran = run("generate", "x", "--port", "8000")
    assert ran.exit_code == 2
    assert "No such option: --port; nanovllm has --endpoint tcp://HOST:PORT" in ran.output
    assert "Did you mean --seed" in run("generate", "x", "--sed", "1").output.replace("'", "")
    assert "nanovllm has --ingress" in run("serve", "--host", "x").output
    launch_options = {name for option in launch.params for name in option.opts}
    request_options = {"--endpoint", "--max-tokens", "--system"}
    for hints, options in ((LAUNCH_HINTS, launch_options), (REQUEST_HINTS, request_options)):
        named = {word for hint in hints.values() for word in re.findall(r"--[a-z-]+", hint)}
        assert named <= options
        assert not hints.keys() & options


def test_serve_is_the_launcher() -> None:
    helped = CliRunner().invoke(launch, ["--help"], prog_name="nanovllm serve")
    assert run("serve", "--help").output == helped.output
    command = (sys.executable, "-m", "nanovllm", "serve", "./nothing")
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "no such model: ./nothing" in ran.stderr


@pytest.mark.parametrize("leftover", [False, True])
def test_status_says_when_nothing_runs(
    tmp_path: Path, leftover: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovllm.client.control.TIMEOUT_S", 0.3)
    if leftover:
        (tmp_path / "control.sock").touch()
    ran = run("status", "--runtime-dir", str(tmp_path))
    assert ran.exit_code == 1
    assert f"no pipeline runs in {tmp_path}" in ran.output
    assert "nanovllm-launch" in ran.output
