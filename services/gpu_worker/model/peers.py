"""Memory of one rank that the other ranks of its machine can write, see `kernels.collectives`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from nanovllm.kernels.sampling import SHORTLIST_SIZE
from nanovllm.settings import SettingsError

if TYPE_CHECKING:
    from nanovllm.kernels.collectives.peers import PeerRows, Watch
    from nanovllm.kernels.collectives.two_shot import TwoShot

# Of a call's rows: with more, two shots are faster, see `benchmarks.collectives`.
MAX_ONE_SHOT_BYTES = 256 << 10  # of two ranks
MAX_ONE_SHOT_BYTES_OF_MORE = 192 << 10
# With more, NCCL sums. A rank's memory is three times as large.
MAX_TWO_SHOT_BYTES = 16 << 20
MAX_SHORTLISTS = 512


class Peers(NamedTuple):
    """What this rank shares with the others.

    Attributes:
        sums: of few of the residual stream's rows.
        two_shot: of more of them.
        shortlists: exchanges the rows that sampling exchanges in every step.
        memory: what the others write. Its addresses there hold as long as it lives.
    """

    sums: PeerRows
    two_shot: TwoShot
    shortlists: PeerRows
    watch: Watch
    memory: object

    @staticmethod
    def reachable(device: torch.device, ranks: int) -> bool:
        """Whether this rank can write the memory of all ranks, whose devices are 0 up to
        `ranks`."""
        return (
            device.type == "cuda"
            # NCCL's variable, for machines that promise what they do not keep.
            and os.environ.get("NCCL_P2P_DISABLE", "0") == "0"
            and all(
                torch.cuda.can_device_access_peer(device, other)
                for other in range(ranks)
                if other != device.index
            )
        )

    @classmethod
    def join(
        cls,
        group: dist.ProcessGroup,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Peers:
        """All ranks call it together.

        Args:
            hidden_size, dtype: of the residual stream.

        Raises:
            SettingsError: if the system lets no process use another one's memory on a GPU.
        """
        from torch.distributed import _symmetric_memory

        # Imported where it is used: a CPU may have no Triton.
        from nanovllm.kernels.collectives.peers import WORD, PeerRows, Watch
        from nanovllm.kernels.collectives.two_shot import TwoShot

        # Multicast needs rights that a container may lack, and none of the kernels uses it.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        ranks, rank = group.size(), group.rank()
        row_bytes = hidden_size * dtype.itemsize
        width = row_bytes // 4
        rows = (MAX_ONE_SHOT_BYTES if ranks == 2 else MAX_ONE_SHOT_BYTES_OF_MORE) // row_bytes
        more_rows = MAX_TWO_SHOT_BYTES // row_bytes
        sums = PeerRows.num_words(ranks, width, rows)
        shortlists = PeerRows.num_words(ranks, 2 * SHORTLIST_SIZE, MAX_SHORTLISTS)
        two_shot = TwoShot.num_words(ranks, width, more_rows)
        memory = _symmetric_memory.empty(sums + shortlists + two_shot, dtype=WORD, device=device)
        memory.zero_()
        torch.cuda.synchronize(device)
        try:
            shared = _symmetric_memory.rendezvous(memory, group)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise SettingsError(
                f"ranks cannot share the memory of their GPUs: {reason}; with NCCL_P2P_DISABLE=1 in"
                " the environment they do without"
            ) from error
        addresses = torch.tensor(shared.buffer_ptrs, dtype=torch.int64, device=device)
        watch = Watch.on(device)
        return cls(
            PeerRows(addresses, rank, width, rows, watch),
            TwoShot(addresses + 8 * (sums + shortlists), rank, width, more_rows, watch),
            PeerRows(addresses + 8 * sums, rank, 2 * SHORTLIST_SIZE, MAX_SHORTLISTS, watch),
            watch,
            (memory, shared),
        )
