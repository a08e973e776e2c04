"""The runner of a real model, on a CPU or on CUDA.

A device thread imports torch, loads the model and runs steps, so that the loop is free for new
plans, dead ranks and signals, and says that the service lives: from a cold disk the import may take
minutes. On a CPU torch computes in the device thread, and releases the interpreter's lock. On CUDA
the device thread only enqueues, and a results thread waits for each step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from nanovllm.checkpoint import ModelConfig
from nanovllm.control import LoadingStage
from nanovllm.grammars import Matcher
from nanovllm.mailbox import Mailbox
from nanovllm.messages import StepPlan
from nanovllm.quietly import quietly
from nanovllm.services.gpu_worker.runner import Listening, Loaded, Progress, Report
from nanovllm.settings import Settings

if TYPE_CHECKING:
    import torch

    from nanovllm.services.gpu_worker.executor import Executor
    from nanovllm.services.gpu_worker.model.parallel import TensorParallel
    from nanovllm.services.gpu_worker.results import PendingResult

PROGRESS_INTERVAL_S = 0.1


class Launched(NamedTuple):
    """A step, and the matchers of the sequences that it admits, by slot."""

    plan: StepPlan
    matchers: Mapping[int, Matcher]


class TorchRunner:
    """Implements `Runner`.

    Args:
        directory: the checkpoint's directory.
        config: the checkpoint's shape.
        settings: settled, see `service.settled`.
        rank: this rank in its tensor-parallel group.
    """

    def __init__(self, directory: Path, config: ModelConfig, settings: Settings, rank: int) -> None:
        self._directory = directory
        self._config = config
        self._settings = settings
        self._rank = rank
        self._start = time.monotonic()
        self._busy = BusyMeter()
        self._device_busy = 0.0
        self._report_queue = Mailbox[Report]()
        self._port: SimpleQueue[int] = SimpleQueue()
        self._launched: SimpleQueue[Launched | None] = SimpleQueue()  # None is a reset
        self._enqueued: SimpleQueue[PendingResult] = SimpleQueue()
        self._executor: Executor | None = None
        self._start_thread("device", self._execute)

    @property
    def descriptor(self) -> int:
        return self._report_queue.descriptor

    @property
    def slots_used(self) -> int:
        return 0 if self._executor is None else self._executor.slots.used

    def join(self, port: int) -> None:
        self._port.put(port)

    def launch(self, plan: StepPlan, matchers: Mapping[int, Matcher]) -> None:
        self._busy.launched(time.monotonic())
        self._launched.put(Launched(plan, matchers))

    def reset(self) -> None:
        self._launched.put(None)

    def reports(self) -> list[Report]:
        return self._report_queue.take()

    def _start_thread(self, name: str, body: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                body()
            except BaseException as error:  # the loop raises it again, which ends the process
                self._report_queue.put(error)

        threading.Thread(target=guarded, name=name, daemon=True).start()

    def _load(self) -> tuple[Executor, Loaded, torch.device]:
        from nanovllm.services.gpu_worker import startup

        device = startup.choose_device(self._settings, self._rank)
        executor, loaded = startup.load(
            self._directory,
            self._config,
            self._settings,
            device,
            self._join_group(device),
            self._tell_progress(),
        )
        return executor, loaded, device

    def _execute(self) -> None:
        executor, loaded, device = quietly(self._load)
        self._executor = executor
        self._report_queue.put(loaded)
        finish: Callable[[PendingResult], None] = self._finish
        if device.type == "cuda":
            import torch

            torch.cuda.set_device(device)  # a thread's own
            self._start_thread("results", partial(self._finish_enqueued, device))
            finish = self._enqueued.put
        while True:
            launched = self._launched.get()
            if launched is None:
                executor.reset()
            else:
                finish(executor.step(launched.plan, launched.matchers))

    def _finish_enqueued(self, device: torch.device) -> None:
        import torch

        # The current device is a thread's own. A wait on another device than the current one would
        # take memory on the current one.
        torch.cuda.set_device(device)
        while True:
            self._finish(self._enqueued.get())

    def _finish(self, pending: PendingResult) -> None:
        pending.wait()
        now = time.monotonic()
        busy = self._busy.finished(now)
        if (seconds := pending.device_seconds()) is not None:
            self._device_busy += seconds
            busy = self._device_busy
        self._report_queue.put(pending.result(round(busy * 1e6), round((now - self._start) * 1e6)))

    def _join_group(self, device: torch.device) -> TensorParallel:
        from nanovllm.services.gpu_worker.model.parallel import (
            TensorParallel,
            listen_for_ranks,
            reach_rank_0,
        )

        size = self._settings.tensor_parallel_size
        if size == 1:
            return TensorParallel()
        if self._rank == 0:
            store = listen_for_ranks()
            self._report_queue.put(Listening(store.port))
        else:
            store = reach_rank_0(self._port.get())
        return TensorParallel.connect(self._rank, size, store, device)

    def _tell_progress(self) -> Callable[[LoadingStage, int, int], None]:
        """Reports how far loading is: the begin and end of each stage, and in between at most every
        PROGRESS_INTERVAL_S seconds."""
        told = 0.0

        def tell(stage: LoadingStage, done: int, total: int) -> None:
            nonlocal told
            now = time.monotonic()
            if now - told >= PROGRESS_INTERVAL_S or done in (0, total):
                told = now
                self._report_queue.put(Progress(stage, done, total))

        return tell


class BusyMeter:
    """Adds up the time in which at least one step was launched and not finished.

    Times are seconds of one clock. Threads may differ in which of the methods they call.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight = 0
        self._busy = 0.0
        self._since = 0.0

    def launched(self, now: float) -> None:
        with self._lock:
            if self._in_flight == 0:
                self._since = now
            self._in_flight += 1

    def finished(self, now: float) -> float:
        """Notes the end of a step. Returns the busy time up to `now`."""
        with self._lock:
            self._in_flight -= 1
            self._busy += now - self._since
            self._since = now
            return self._busy
