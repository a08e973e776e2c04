"""What tests of the whole pipeline share: a running one, and the means to start others."""

from __future__ import annotations

import atexit
import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# NumPy starts a thread for each core when imported: processes that tests start by the hundred.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

# Where there is no GPU, Triton's kernels run in its interpreter. Triton reads this when it is
# imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import tests.interpreter  # noqa: F401
from benchmarks.support.pipeline import Pipeline

# Modules live as long as the process: no collection is to look through them, neither while they are
# imported nor while tests run, see `pytest_collection_finish`.
gc.disable()
atexit.register(gc.unfreeze)  # or bindings warn that they leak

# A shell ignores SIGINT for what it starts in the background, and so do the children of that. Tests
# press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says something of the machine, not of the code.
settings.register_profile("nanovllm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nanovllm")

# The models are tiny: on several threads they are slower, by far where ranks compute as well.
torch.set_num_threads(1)


# The directories whose files take longest, so that no process is left with a long one in the end.
LONGEST = (
    *(
        "lint",
        "recovery",
        "machines",
        "pipeline",
        "launch",
        "kernels",
        "gpu_worker",
        "http",
        "page",
        "examples",
    ),
    "bench",
)
MOST_PROCESSES = 8


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are cores: many tests wait. On a GPU, whose memory they would
    share, none but this one."""
    if torch.cuda.is_available():
        return 0
    return min(len(os.sched_getaffinity(0)) + 1, MOST_PROCESSES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        directory = item.path.parent.name
        return LONGEST.index(directory) if directory in LONGEST else len(LONGEST)

    items.sort(key=place)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Says last which tests failed and why; pytest's own line ends where the terminal does."""
    yield
    for outcome in ("failed", "error"):
        for report in terminalreporter.getreports(outcome):
            crash = getattr(report.longrepr, "reprcrash", None)
            why = crash.message if crash else str(report.longrepr)
            where = f"{crash.path}:{crash.lineno}: " if crash else ""
            terminalreporter.write_line(f"{outcome.upper()} {report.nodeid}", red=True)
            terminalreporter.write_line(f"    {where}{why.strip().splitlines()[0][:400]}")


@pytest.fixture(scope="session")
def pipeline() -> Iterator[Pipeline]:
    """A pipeline that serves the demo checkpoint in float32, for the whole test run."""
    with Pipeline("", "--dtype", "float32") as running:
        yield running


@pytest.fixture
def start_pipeline() -> Iterator[Callable[..., Pipeline]]:
    """Starts pipelines with the given command-line arguments; ends them with the test. Skips the
    test where there are GPUs, but fewer than ranks."""
    started: list[Pipeline] = []

    def start(model: Path | str = "", *arguments: str) -> Pipeline:
        ranks = int(arguments[arguments.index("--tp") + 1]) if "--tp" in arguments else 1
        if "--device" not in arguments and 0 < torch.cuda.device_count() < ranks:
            pytest.skip("there are fewer GPUs than ranks")
        started.append(Pipeline(model, *arguments).start())
        return started[-1]

    yield start
    for running in started:
        running.stop()
