"""What the device holds of each slot. A step copies to it only what its plan changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm.kernels.sampling.reference import SamplingTensors
from nanovllm.kernels.slots.ops import SlotState
from nanovllm.messages import Admission
from nanovllm.services.gpu_worker.slots import Batch


def to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy of `array` on the device, without waiting for it."""
    host = torch.from_numpy(array)
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


class DeviceState:
    """The slots' state on the device.

    Args:
        spare_block: a block that no sequence has.

    Attributes:
        padding_slot: one more than there are, which is nobody's. It takes the rows that a captured
            step has too many.
        held: what there is of each slot.
    """

    def __init__(
        self, max_num_seqs: int, max_blocks: int, spare_block: int, device: torch.device
    ) -> None:
        slots = max_num_seqs + 1

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._device = device
        self.padding_slot = max_num_seqs
        self.held = SlotState(
            block_tables=zeros(slots, max_blocks, dtype=torch.int32),
            num_tokens=zeros(slots, dtype=torch.int64),
            last_tokens=zeros(slots, dtype=torch.int64),
            sampling=SamplingTensors(
                temperature=zeros(slots, dtype=torch.float32),
                top_k=zeros(slots, dtype=torch.int32),
                top_p=zeros(slots, dtype=torch.float32),
                min_p=zeros(slots, dtype=torch.float32),
                seed=zeros(slots, dtype=torch.int64),
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
        asked = [admission.sampling for admission in admitted]
        integers = np.array(
            [
                [admission.slot for admission in admitted],
                [len(admission.tokens) // 4 for admission in admitted],
                [sampling.top_k for sampling in asked],
                [sampling.seed for sampling in asked],
            ],
            dtype=np.int64,
        )
        fractions = np.array(
            [
                [sampling.temperature for sampling in asked],
                [sampling.top_p for sampling in asked],
                [sampling.min_p for sampling in asked],
            ],
            dtype=np.float32,
        )
        slots, num_tokens, top_k, seed = to_device(integers, self._device)
        temperature, top_p, min_p = to_device(fractions, self._device)
        self.held.num_tokens[slots] = num_tokens
        held = self.held.sampling
        held.top_k[slots] = top_k.int()
        held.seed[slots] = seed
        held.temperature[slots] = temperature
        held.top_p[slots] = top_p
        held.min_p[slots] = min_p
