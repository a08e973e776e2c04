"""What the device holds of the slots, after plans were applied."""

from __future__ import annotations

import torch

from nanovllm.kernels.sampling.reference import SamplingTensors
from nanovllm.messages import Admission, pack
from nanovllm.protocol import Sampling
from nanovllm.services.gpu_worker.slot_state import DeviceState
from nanovllm.services.gpu_worker.slots import SlotTable
from tests.gpu_worker.paged import CPU
from tests.gpu_worker.plans import step_plan


def sampling(number: int) -> Sampling:
    """Of no two numbers is a parameter the same; the seeds need all of an int64."""
    part = 1 / (number + 2)
    return Sampling(
        temperature=number + 0.1,
        top_p=part,
        top_k=number + 3,
        min_p=part / 3,
        seed=number - 2**63,
        logprobs=None,
    )


def test_an_admission_reaches_the_device_whole() -> None:
    table, state = SlotTable(4), DeviceState(4, max_blocks=3, spare_block=9, device=CPU)
    admitted = [
        Admission(2, pack([5, 6, 7]), 2, pack([4, 8]), 0, sampling(0)),
        Admission(0, pack([1]), 1, b"", 0, sampling(1)),
    ]
    state.update(table.apply(step_plan(0, admit=admitted, append=[(0, 7)])))
    state.update(table.apply(step_plan(1, append=[(2, 1)])))
    again = Admission(2, pack([3] * 5), 4, pack([6]), 0, sampling(2))
    held: list[tuple[int, Admission]] = [(2, admitted[0]), (0, admitted[1])]
    for blocks in ([4, 8, 1], [6, 8, 1]):
        for slot, admission in held:
            assert state.held.num_tokens[slot] == len(admission.tokens) // 4
        params = state.sampling(torch.tensor([slot for slot, _ in held]))
        for name, column in zip(SamplingTensors._fields, params, strict=True):
            asked = [getattr(admission.sampling, name) for _, admission in held]
            assert column.tolist() == torch.tensor(asked, dtype=column.dtype).tolist(), name
        assert state.held.block_tables[2].tolist() == blocks
        assert state.held.block_tables[0, 0] == 7
        state.update(table.apply(step_plan(2, release=[2], admit=[again])))
        held[0] = (2, again)
    assert state.held.num_tokens[state.padding_slot] == 1
    assert state.held.block_tables[state.padding_slot].tolist() == [9, 9, 9]
