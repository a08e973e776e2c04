"""What a step sends back: the host's copies of tokens and log-probabilities, under way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.messages import (
    TOO_COSTLY,
    PromptPart,
    RowLogprobs,
    StepResult,
    TokenLogprobs,
    pack,
)
from nanovllm.services.gpu_worker.model.parallel import TensorParallel
from nanovllm.services.gpu_worker.slots import Int32s

NO_ROWS: Int32s = np.empty(0, dtype=np.int32)


class SampledLogprobs(NamedTuple):
    """Log-probabilities of the r rows that asked, see `sampling.logprobs`."""

    rows: list[tuple[int, int]]  # (index among the rows that sampled, tokens asked for)
    token_ids: Tensor  # int32 [r, most asked for + 1]
    values: Tensor  # float32 [r, most asked for + 1]


class PromptLogprobs(NamedTuple):
    """Of a prefill chunk's tokens, from index `first` of the prompt on: int32 and float32
    [t, count + 1]."""

    first: int
    token_ids: Tensor
    values: Tensor

    def message(self) -> PromptPart:
        ids, values = pack(self.token_ids.numpy()), self.values.numpy().astype("<f4", copy=False)
        return PromptPart(self.first, self.token_ids.shape[1], ids, values.tobytes())


class PendingResult(NamedTuple):
    """The host's copy of what an enqueued step samples. The tensors are complete once `wait` has
    returned."""

    number: int  # the plan's
    token_ids: Tensor  # int32 [s]
    logprobs: SampledLogprobs | None  # None if no row asked
    started: torch.cuda.Event | None  # the step's begin; None on a CPU
    on_host: torch.cuda.Event | None  # the end of the copies to the host; None on a CPU
    tp: TensorParallel
    prompt: Sequence[PromptLogprobs] = ()
    too_costly: Int32s = NO_ROWS  # the rows whose grammars took too much work

    def wait(self) -> None:
        """Raises GroupBroken if another rank did not take part in the step."""
        if self.on_host is not None:
            self.on_host.synchronize()
        self.tp.check()

    def device_seconds(self) -> float | None:
        """How long the step took by the device's clock; None on a CPU. Call `wait` first."""
        if self.started is None or self.on_host is None:
            return None
        return float(self.started.elapsed_time(self.on_host)) / 1000

    def result(self, busy_us: int, at_us: int) -> StepResult:
        """The step's result as a message. Call `wait` first."""
        token_ids = self.token_ids.numpy()
        if len(self.too_costly):
            token_ids = token_ids.copy()
            token_ids[self.too_costly] = TOO_COSTLY
        return StepResult(
            number=self.number,
            token_ids=pack(token_ids),
            logprobs=[] if self.logprobs is None else _rows(self.logprobs),
            busy_us=busy_us,
            at_us=at_us,
            prompt_parts=[part.message() for part in self.prompt],
        )


def to_host(x: Tensor) -> Tensor:
    # From CUDA torch copies to pinned memory, so that nothing waits for the copy. The next step may
    # overwrite `x`, wherever that is.
    return x.to("cpu", non_blocking=True, copy=True)


def _rows(found: SampledLogprobs) -> list[RowLogprobs]:
    ids, values = found.token_ids.numpy(), found.values.numpy()
    return [
        RowLogprobs(
            row=row,
            logprobs=TokenLogprobs(
                token_ids=pack(ids[i, : count + 1]),
                values=values[i, : count + 1].astype("<f4", copy=False).tobytes(),
            ),
        )
        for i, (row, count) in enumerate(found.rows)
    ]
