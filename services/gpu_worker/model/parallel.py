"""Tensor parallelism: who this rank is, its heads, and the collectives of a forward pass."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from nanovllm.checkpoint import ModelConfig
from nanovllm.services.gpu_worker.group import GroupBroken


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """This rank's place in its group. With size 1 (the default) collectives do nothing.

    All ranks must make the same calls in the same order with the same shapes. A call raises
    GroupBroken where it fails, as it does when another rank is gone.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def connect(cls, rank: int, size: int, store: Store, device: torch.device) -> TensorParallel:
        """Joins the group: NCCL on CUDA, gloo on a CPU. Blocks until all ranks are there.

        Args:
            store: where the ranks find one another; its timeout is that of joining and of each
                collective.
            device: this rank's device, which collectives run on.

        Raises GroupBroken if the others do not come, or not in time.
        """
        if sys.platform == "linux":
            # Else gloo binds to whatever the host's name resolves to, if it does.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        on_cuda = device.type == "cuda"
        _together(
            dist.init_process_group,
            backend="nccl" if on_cuda else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=store.timeout,  # type: ignore[attr-defined]
            device_id=device if on_cuda else None,
        )
        return cls(rank, size, dist.group.WORLD)

    def close(self) -> None:
        """Leaves the group."""
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, written into it and returned."""
        if self.group is not None:
            _together(dist.all_reduce, x, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' `x` [rows, columns] side by side: [rows, size * columns]."""
        if self.group is None:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        _together(dist.all_gather, parts, x, group=self.group)
        return torch.cat(parts, dim=-1)

    def all_to_all(self, x: Tensor) -> Tensor:
        """Of x [size, ...], part r goes to rank r; returns what came from each rank."""
        if self.group is None:
            return x
        received = torch.empty_like(x)
        _together(dist.all_to_all_single, received, x, group=self.group)
        return received

    def minimum(self, value: int, device: torch.device) -> int:
        """The least of all ranks' `value`, on the host (not for the step's path: it waits)."""
        if self.group is None:
            return value
        least = torch.tensor(value, dtype=torch.int64, device=device)
        _together(dist.all_reduce, least, op=dist.ReduceOp.MIN, group=self.group)
        return int(least.item())


def _together(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Makes a call that all ranks must make."""
    try:
        call(*args, **kwargs)
    except RuntimeError as error:  # gloo and NCCL have no narrower one in common
        reason = str(error).splitlines()[0]
        raise GroupBroken(
            f"a rank of this tensor-parallel group does not answer: {reason}"
        ) from error


class VocabShard(NamedTuple):
    """The token ids that this rank has logits of: from `first` on."""

    tp: TensorParallel
    first: int


class LocalHeads(NamedTuple):
    """A rank's attention heads: query heads [first, first + num), and as much for key/value."""

    first: int
    num: int
    first_kv: int
    num_kv: int


def local_heads(config: ModelConfig, tp: TensorParallel) -> LocalHeads:
    """Heads spread over the ranks; key/value heads are replicated where TP exceeds them."""
    num = config.num_attention_heads // tp.size
    return LocalHeads(
        first=tp.rank * num,
        num=num,
        first_kv=tp.rank * config.num_key_value_heads // tp.size,
        num_kv=max(1, config.num_key_value_heads // tp.size),
    )
