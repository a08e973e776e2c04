"""Tensor parallelism: how the ranks find one another, their collectives, and the heads of each.

All ranks are on one machine. Rank 0 listens at a free port and tells the others which (see `loop`).
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from nanovllm.checkpoint import ModelConfig
from nanovllm.kernels.layers.ops import LayerOps, Norm
from nanovllm.services.gpu_worker.model.peers import Peers
from nanovllm.services.gpu_worker.runner import GroupBroken

HOST = "127.0.0.1"
# Of joining, and of a collective while a slower rank still loads. The death of a rank is noticed at
# once by the link between the ranks.
TIMEOUT = timedelta(minutes=30)
# Of the first collective, which shows whether the GPUs can reach one another before weights are
# loaded.
FIRST_TIMEOUT = timedelta(minutes=2)
# Of a rank's words in another one's memory, once steps run.
PEER_TIMEOUT_NS = 10 * 10**9
# From torch 2.13 on all_gather_into_tensor is called so, and the old name warns.
_NEW_NAME = "all_gather_single"
_all_gather = getattr(dist, _NEW_NAME if hasattr(dist, _NEW_NAME) else "all_gather_into_tensor")


def listen_for_ranks() -> TCPStore:
    """Rank 0's store, at a free port (its `port`). Does not wait for the other ranks."""
    # The store's own socket would listen on every interface, and a store trusts every process.
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
    """Rank 0's store, as another rank uses it."""
    return TCPStore(HOST, port, is_master=False, timeout=TIMEOUT)


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """One rank of a group. With size 1 (the default) collectives do nothing.

    All ranks must make the same calls in the same order with the same shapes. A call raises
    GroupBroken if it fails, as when another rank is gone; a fault of this rank's own device is
    raised as torch raises it.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    peers: Peers | None = None

    @classmethod
    def connect(cls, rank: int, size: int, store: Store, device: torch.device) -> TensorParallel:
        """Joins the group: NCCL on CUDA, gloo on a CPU. Blocks until all ranks have joined.

        Args:
            store: where the ranks find one another. The store's timeout holds for joining and for
                each collective.
            device: this rank's device, which collectives run on.

        Raises:
            GroupBroken: if the other ranks do not join in time.
        """
        if sys.platform == "linux":
            # By default they bind to the address of the host's name, or to the first interface.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        # All collectives, in graphs and outside, are in one stream. So NCCL need not record an
        # event at each collective of a graph.
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

    def with_peers(self, hidden_size: int, dtype: torch.dtype, device: torch.device) -> Self:
        """The same rank, which reaches the other ranks' memory wherever it can: then NCCL is left
        what is large.

        Args:
            hidden_size, dtype: of the residual stream.
        """
        if self.group is None or not self.minimum(Peers.reachable(device, self.size), device):
            return self
        return replace(self, peers=Peers.join(self.group, hidden_size, dtype, device))

    def begin_steps(self, device: torch.device) -> None:
        """Waits for all ranks. From here on no rank waits for another one's memory for long."""
        self.minimum(0, device)
        if self.peers is not None:
            self.peers.watch.bound.fill_(PEER_TIMEOUT_NS)

    def check(self) -> None:
        """Raises GroupBroken if this rank has waited for another one in vain, so that what it
        computed since is worthless."""
        if self.peers is not None and self.peers.watch.told.item():
            raise GroupBroken(
                "a rank of this tensor-parallel group does not answer: it wrote nothing to this"
                f" rank's memory for {PEER_TIMEOUT_NS // 10**9} s"
            )

    def close(self) -> None:
        """Leaves the group."""
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, written into it and returned."""
        if self.group is not None:
            _together(dist.all_reduce, x, group=self.group)
        return x

    def add(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The sum of all ranks' `x` and of `residual`."""
        if self.peers is not None and self.peers.sums.fits(x):
            return self.peers.sums.add(x, residual)
        total = self.all_reduce(x)
        return total if residual is None else residual + total

    def add_rms_norm(
        self, x: Tensor, residual: Tensor | None, norm: Norm, ops: LayerOps
    ) -> tuple[Tensor, Tensor]:
        """As `ops.add_rms_norm`, where `x` is this rank's part of a sum over the ranks.

        The stream that is returned may lack rows that other ranks have. Later sums of as many rows
        do without them.
        """
        if self.peers is not None:
            for sums in (self.peers.sums, self.peers.two_shot):
                if sums.fits(x):
                    return sums.add_rms_norm(x, residual, norm)
        return ops.add_rms_norm(self.all_reduce(x), residual, norm)

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' `x` [rows, columns] side by side: [rows, size * columns]."""
        if self.group is None:
            return x
        if self.peers is not None and self.peers.shortlists.fits(x):
            return self.peers.shortlists.all_gather(x)
        rows, columns = x.shape
        parts = x.new_empty(self.size * rows, columns)
        _together(_all_gather, parts, x.contiguous(), group=self.group)
        return parts.view(self.size, rows, columns).transpose(0, 1).flatten(1)

    def all_to_all(self, x: Tensor) -> Tensor:
        """x [size, ...]: part r goes to rank r. Returns the same shape: part r came from rank r."""
        if self.group is None:
            return x
        received = torch.empty_like(x)
        _together(dist.all_to_all_single, received, x, group=self.group)
        return received

    def minimum(self, value: int, device: torch.device) -> int:
        """The least of all ranks' `value`. Not for the step path: the host waits for the device."""
        if self.group is None:
            return value
        least = torch.tensor(value, dtype=torch.int64, device=device)
        _together(dist.all_reduce, least, op=dist.ReduceOp.MIN, group=self.group)
        return int(least.item())


def _reach_all(device: torch.device) -> None:
    dist.all_reduce(torch.zeros(1, device=device), async_op=True).wait(FIRST_TIMEOUT)


def _together(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Makes a call that all ranks make together."""
    try:
        call(*args, **kwargs)
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # this rank's own
        raise
    except RuntimeError as error:  # gloo and NCCL share no narrower class
        # NCCL says in the last lines what happened.
        reason = "; ".join(filter(None, map(str.strip, str(error).splitlines())))
        raise GroupBroken(
            f"a rank of this tensor-parallel group does not answer: {reason}"
        ) from error


class VocabShard(NamedTuple):
    """The token ids that this rank has logits of: from `first` on."""

    tp: TensorParallel
    first: int


class LocalHeads(NamedTuple):
    """A rank's heads: query heads [first, first + num), and key/value heads
    [first_kv, first_kv + num_kv)."""

    first: int
    num: int
    first_kv: int
    num_kv: int


def local_heads(config: ModelConfig, tp: TensorParallel) -> LocalHeads:
    """The heads of this rank. If there are more ranks than key/value heads, several ranks have the
    same key/value head."""
    num = config.num_attention_heads // tp.size
    return LocalHeads(
        first=tp.rank * num,
        num=num,
        first_kv=tp.rank * config.num_key_value_heads // tp.size,
        num_kv=max(1, config.num_key_value_heads // tp.size),
    )
