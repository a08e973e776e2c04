"""Tensor parallelism: who this rank is, and the collectives that a forward pass needs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """This rank's place in its group. With size 1 (the default) collectives do nothing.

    All ranks must make the same calls in the same order with the same shapes.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def connect(
        cls, rank: int, size: int, rendezvous: str, device: torch.device, timeout_s: float
    ) -> TensorParallel:
        """Joins the group: NCCL on CUDA, gloo on a CPU. Blocks until all ranks are there.

        Args:
            rendezvous: a URL that is the same for all ranks: `tcp://host:port` (rank 0 listens
                there) or `file:///path` (of a file that does not exist yet).
            device: this rank's device, which collectives run on.
            timeout_s: for joining, and for each collective.

        Raises:
            torch.distributed.DistError: if the others do not come in time.
        """
        if size == 1:
            return cls()
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            init_method=rendezvous,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
        return cls(rank, size, dist.group.WORLD)

    def close(self) -> None:
        """Leaves the group."""
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, written into it and returned."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' `x` [rows, columns] side by side: [rows, size * columns]."""
        if self.group is None:
            return x
        rows, columns = x.shape
        gathered = x.new_empty(self.size, rows, columns)
        dist.all_gather_into_tensor(gathered.view(-1), x.contiguous().view(-1), group=self.group)
        return gathered.transpose(0, 1).reshape(rows, self.size * columns)

    def minimum(self, value: int, device: torch.device) -> int:
        """The least of all ranks' `value`, on the host (not for the step's path: it waits)."""
        if self.group is None:
            return value
        least = torch.tensor(value, dtype=torch.int64, device=device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.group)
        return int(least.item())
