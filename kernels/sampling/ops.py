"""What a device samples with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.sampling import candidates, reference
from nanovllm.kernels.sampling.reference import SamplingTensors


class SamplingOps(NamedTuple):
    """See `reference.sample`, `candidates.shortlist` and `candidates.choose`."""

    sample: Callable[[Tensor, SamplingTensors, Tensor], Tensor]
    shortlist: Callable[[Tensor, SamplingTensors, Tensor, int], Tensor]
    choose: Callable[[Tensor, SamplingTensors, Tensor], Tensor]


def choose_sampling_ops(device: torch.device) -> SamplingOps:
    """On CUDA the fused kernels, which look at nothing on the host."""
    if device.type == "cuda":
        from nanovllm.kernels.sampling import fused, fused_candidates

        return SamplingOps(fused.sample, fused_candidates.shortlist, fused_candidates.choose)
    return SamplingOps(reference.sample, candidates.shortlist, candidates.choose)
