"""Tensor parallelism: who this rank is, its heads, and the collectives of a forward pass."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from nanovllm.checkpoint import ModelConfig
from nanovllm.services.gpu_worker.runner import GroupBroken

HOST = "127.0.0.1"
# For joining, and for any collective while a slower rank still loads. A rank that died is noticed
# by the link between the ranks, at once.
TIMEOUT = timedelta(minutes=30)
# For the first collective. GPUs that cannot reach one another are known by it, before weights are
# loaded.
FIRST_TIMEOUT = timedelta(minutes=2)


def listen_for_ranks() -> TCPStore:
    """Rank 0's store, on a free port (its `port`); does not wait for the others."""
    # A socket of our own: the store's would listen on every interface, and trusts whoever comes.
    listener = socket.create_server((HOST, 0))
    port = listener.getsockname()[1]
    return TCPStore(
        HOST,
        port,
        is_master=True,
        timeout=TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def reach_rank_0(port: int) -> TCPStore:
    """Rank 0's store, for another rank."""
    return TCPStore(HOST, port, is_master=False, timeout=TIMEOUT)


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """This rank's place in its group. With size 1 (the default) collectives do nothing.

    All ranks must make the same calls in the same order with the same shapes. A call raises
    GroupBroken where it fails, as it does when another rank is gone, but for faults of this device.
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
            # Else they bind to what the host's name resolves to, or its first interface.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        # All calls, in graphs and outside, follow one another in one stream: NCCL need not record
        # an event at each of those in a graph.
        os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "0")
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
        _together(_reach_all, device)
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
        rows, columns = x.shape
        parts = x.new_empty(self.size * rows, columns)
        _together(dist.all_gather_into_tensor, parts, x.contiguous(), group=self.group)
        return parts.view(self.size, rows, columns).transpose(0, 1).flatten(1)

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


def _reach_all(device: torch.device) -> None:
    dist.all_reduce(torch.zeros(1, device=device), async_op=True).wait(FIRST_TIMEOUT)


def _together(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Makes a call that all ranks must make."""
    try:
        call(*args, **kwargs)
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # this rank's own
        raise
    except RuntimeError as error:  # gloo and NCCL have no narrower one in common
        # NCCL says what happened in the last lines.
        reason = "; ".join(filter(None, map(str.strip, str(error).splitlines())))
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
