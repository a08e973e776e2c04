"""What the device holds of each slot: the one place where that grows.

A parameter of how tokens are drawn is a field of `protocol.Sampling` and, under the same name, a
column of `SamplingTensors`, which the kernels read. `DeviceState` makes the columns, and fills them
when a sequence takes a slot; nothing else in the worker lists the parameters. So a further
parameter is a field, a column made here, and a kernel's matter. What changes logits before tokens
are drawn stands in `logits.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm.kernels.sampling.reference import SamplingTensors
from nanovllm.kernels.slots.ops import SlotState
from nanovllm.messages import Admission
from nanovllm.protocol import Sampling
from nanovllm.services.gpu_worker.slots import Batch

COSTLIEST = Sampling(
    top_p=0.5, top_k=1000, min_p=0.01, seed=0, logprobs=20, prompt_logprobs=20, presence_penalty=1.0
)
"""Takes the most memory to sample with."""


def to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy of `array` on the device, without waiting for it."""
    host = torch.from_numpy(array)
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


class DeviceState:
    """The slots' state on the device. A step copies to it only what the step's plan changed.

    Args:
        max_blocks: columns of the block tables.
        spare_block: a block that no sequence has.

    Attributes:
        padding_slot: one slot more, which no sequence has. It takes the rows that a captured step
            has too many.
        held: the state that the kernels read and write.
    """

    def __init__(
        self, max_num_seqs: int, max_blocks: int, spare_block: int, device: torch.device
    ) -> None:
        slots = max_num_seqs + 1

        def zeros(dtype: torch.dtype, *more: int) -> Tensor:
            return torch.zeros((slots, *more), dtype=dtype, device=device)

        self._device = device
        self.padding_slot = max_num_seqs
        self.held = SlotState(
            block_tables=zeros(torch.int32, max_blocks),
            num_tokens=zeros(torch.int64),
            last_tokens=zeros(torch.int64),
            sampling=SamplingTensors(
                temperature=zeros(torch.float32),
                top_k=zeros(torch.int32),
                top_p=zeros(torch.float32),
                min_p=zeros(torch.float32),
                seed=zeros(torch.int64),
            ),
        )
        self.held.block_tables[self.padding_slot] = spare_block
        self.held.num_tokens[self.padding_slot] = 1

    def update(self, batch: Batch) -> None:
        """Writes what the batch's plan changed."""
        if batch.admitted:
            self._admit(batch.admitted)
        if len(batch.block_updates):
            updates = batch.block_updates.T.astype(np.int64, order="C")
            slots, columns, blocks = to_device(updates, self._device)
            self.held.block_tables[slots, columns] = blocks.int()

    def sampling(self, slots: Tensor) -> SamplingTensors:
        """The parameters of the rows that sample, whose slots are `slots` int64 [s]."""
        return SamplingTensors(*(column[slots] for column in self.held.sampling))

    def _admit(self, admitted: Sequence[Admission]) -> None:
        """Fills the columns of the slots taken. Two copies, whatever the number of columns."""
        columns: list[tuple[Tensor, list[float]]] = [
            (self.held.num_tokens, [len(one.tokens) // 4 for one in admitted])
        ]
        for name, column in self.held.sampling._asdict().items():
            columns.append((column, [getattr(one.sampling, name) for one in admitted]))
        integers = [column for column in columns if not column[0].is_floating_point()]
        fractions = [column for column in columns if column[0].is_floating_point()]

        def copied(values: list[list[float]], dtype: type[np.generic]) -> Sequence[Tensor]:
            return to_device(np.array(values, dtype=dtype), self._device).unbind()

        slots, *whole = copied(
            [[one.slot for one in admitted], *(values for _, values in integers)], np.int64
        )
        parts = copied([values for _, values in fractions], np.float32)
        for (column, _), values in zip(integers + fractions, [*whole, *parts], strict=True):
            column[slots] = values.to(column.dtype)
