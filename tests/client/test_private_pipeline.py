"""LLM with a pipeline of its own: real processes, which end with it however it ends."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.checkpoint import DEMO_CHECKPOINT
from tests.terminal import BAR_IS_DRAWN, shown

TIMEOUT_S = 60

# A program without a `__main__` guard that says when its pipeline serves, and then waits.
PROGRAM = """
from nanovllm import LLM, SamplingParams
llm = LLM("", device="sim", sim_step_ms=5.0)
assert len(llm.generate("Once", SamplingParams(0.0, 4), use_tqdm=False)[0]["token_ids"]) > 0
print("serving", flush=True)
{then}
"""
# Until the test has counted the program's descendants.
WAIT = "import sys; sys.stdin.read()\n"
WORK = "llm.generate(['Once'] * 4, SamplingParams(max_tokens=4000, ignore_eos=True))"


@pytest.fixture
def own_tmp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary directory, with a path short enough for sockets, where leftovers are seen."""
    directory = tempfile.mkdtemp(prefix="nv-")
    monkeypatch.setenv("TMPDIR", directory)
    monkeypatch.setattr(tempfile, "tempdir", directory)
    yield Path(directory)
    shutil.rmtree(directory)


def start(then: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """The program, once its pipeline serves, and all its descendants."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(then=then)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    said = program.stdout.readline()
    assert said == "serving\n", program.communicate(timeout=TIMEOUT_S)
    return program, psutil.Process(program.pid).children(recursive=True)


def all_ended(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=TIMEOUT_S)
    return not alive


@pytest.mark.parametrize("how", ["end", "exception", "exit", "sigint", "sigterm", "sigkill"])
def test_it_ends_with_its_program(how: str, own_tmp: Path) -> None:
    last = {"end": "", "exception": "raise ValueError('boo')", "exit": "llm.exit()"}
    program, descendants = start(WAIT + last[how] if how in last else WORK)
    assert len(descendants) >= 6, "the launcher and five services"
    if how.startswith("sig"):
        program.send_signal(signal.Signals[how.upper()])
    _, stderr = program.communicate(timeout=TIMEOUT_S)
    assert all_ended(descendants)
    assert list(own_tmp.iterdir()) == [], "nothing is left behind"
    lines = [line for line in stderr.splitlines() if line and "Generating" not in line]
    if how in ("end", "exit"):
        assert (program.returncode, lines) == (0, [])
    elif how == "exception":
        assert lines[-1] == "ValueError: boo"
    elif how == "sigint":
        assert lines[-1] == "KeyboardInterrupt"
        assert sum("Traceback" in line for line in lines) == 1


def test_it_ends_with_its_program_though_a_fork_lives_on(own_tmp: Path) -> None:
    fork = "import os\nfork = os.fork()\nif not fork:\n    sys.stdin.read()\n    os._exit(0)\n"
    program, descendants = start(f"import sys\n{fork}print(fork, flush=True)\n{WORK}")
    assert program.stdout is not None
    fork_pid = int(program.stdout.readline())
    program.kill()
    assert all_ended([process for process in descendants if process.pid != fork_pid])
    program.communicate()  # the fork ends with its input


FORKS = """
import os
for use in (lambda: llm.generate("x", use_tqdm=False), llm.exit):
    if os.fork() == 0:
        use()
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
assert llm.generate("Once", SamplingParams(0.0, 4), use_tqdm=False)[0]["token_ids"]
"""


def test_a_fork_can_neither_use_nor_end_it(own_tmp: Path) -> None:
    program, descendants = start(f"import sys\n{FORKS}")
    stdout, stderr = program.communicate(timeout=TIMEOUT_S)
    assert (program.returncode, stdout.split()) == (0, ["1", "0"]), stderr
    assert re.search("RuntimeError: made in process .*make a new one", stderr)
    assert all_ended(descendants)


def test_it_generates_and_can_be_left_and_made_again(own_tmp: Path) -> None:
    for _ in range(2):
        with LLM("", max_num_seqs=4) as llm:
            outputs = llm.generate(["Once upon a time", [5, 6, 7]], SamplingParams(0.0, 8))
            assert [len(output["token_ids"]) <= 8 for output in outputs] == [True, True]
            assert outputs[0]["text"]
        assert list(own_tmp.iterdir()) == [], "nothing is left behind"


def test_the_launcher_s_refusal_is_the_error(
    own_tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match=r"could not be launched: .*--tp 7 does not divide"):
        LLM("", tensor_parallel_size=7)
    assert list(own_tmp.iterdir()) == []
    assert capfd.readouterr().err == "", "it is said once"


def test_the_bar_shows_the_tokens_of_unfinished_requests(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in BAR_IS_DRAWN.items():
        monkeypatch.setenv(name, value)
    params = SamplingParams(max_tokens=500, ignore_eos=True)
    with LLM("", device="sim", sim_step_ms=5.0) as llm:
        for _ in range(2):  # what a first call got is not the second's
            llm.generate(["Once"] * 2, params)
            frames = shown(capsys.readouterr().err).split("\r")
            told = [
                int(n) for frame in frames for n in re.findall(r"0/2 prompts, (\d+) tokens,", frame)
            ]
            assert told == sorted(told)
            assert told, frames
            assert 0 < told[-1] < 1000
            assert "1000 tokens," in frames[-1]


def test_there_is_no_such_model_and_nothing_is_launched(own_tmp: Path) -> None:
    with pytest.raises(ValueError, match=r"^no such model: /no/checkpoint"):
        LLM("/no/checkpoint")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        LLM(str(own_tmp))
    assert list(own_tmp.iterdir()) == []


def test_a_hub_id_is_downloaded_by_the_program_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    downloaded: list[str] = []

    def download(name: str, **_: object) -> str:
        downloaded.append(name)
        return str(DEMO_CHECKPOINT)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with LLM("owner/name", device="sim") as llm:
        assert llm.generate("Once", SamplingParams(0.0, 4), use_tqdm=False)[0]["token_ids"]
    assert downloaded == ["owner/name"]


def test_a_launch_may_take_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm.llm.PRIVATE_TIMEOUT_S", 0.2)  # a launch takes more
    LLM("", device="sim").exit()


def launchers() -> list[psutil.Process]:
    """Those that this process has started."""
    alive = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
    return [process for process in alive if "nanovllm.launch.cli" in process.cmdline()]


def test_a_pipeline_that_dies_is_reported(own_tmp: Path) -> None:
    before = set(launchers())  # of pipelines that other tests share
    with LLM("", device="sim", sim_step_ms=5.0) as llm:
        (launcher,) = set(launchers()) - before
        services = [launcher, *launcher.children(recursive=True)]
        launcher.kill()
        with pytest.raises(RuntimeError, match="the pipeline has ended"):
            llm.generate("Once", SamplingParams(max_tokens=4000, ignore_eos=True), use_tqdm=False)
    assert all_ended(services)
