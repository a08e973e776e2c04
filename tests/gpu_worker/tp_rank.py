"""What each process of test_tp does; apart, so that the ranks need not import transformers."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

from nanovllm.services.gpu_worker.group import GroupBroken
from nanovllm.services.gpu_worker.model.parallel import TensorParallel, VocabShard
from nanovllm.services.gpu_worker.sampling import logprobs, sample
from tests.gpu_worker.paged import CPU, PagedSequences, load_model
from tests.kernels.drawn import KINDS, NARROW, Row, row_tensors

SIZES = (2, 4)
SEQUENCES = [[3, 141, 59, 26, 5, 358, 97, 93, 238], list(range(60, 99)), [514]]


def checkpoint_directory(root: Path, case: int) -> Path:
    return root / f"checkpoint{case}"


def logits_file(root: Path, case: int, size: int, rank: int) -> Path:
    return root / f"logits-{case}-{size}-{rank}.pt"


def samples_file(root: Path, size: int, rank: int) -> Path:
    return root / f"samples-{size}-{rank}.pt"


def logits_to_sample() -> dict[str, Tensor]:
    """Float32 [len(KINDS), 4003] each."""
    random = torch.randn(len(KINDS), 4003, generator=torch.Generator().manual_seed(3))
    sparse = random * 3
    sparse[sparse < 4] = -torch.inf
    return {
        "flat": random * 0.3,
        "peaked": random * 4,
        "ties": (random * 2).round(),
        "equal": torch.full_like(random, 1.25),
        "mostly -inf": sparse,
    }


class Samples(NamedTuple):
    """Of each logits in `logits_to_sample`: the tokens of rows of all KINDS, of the NARROW ones
    alone, of the first three and of one, and the log-probabilities of the first with those of the
    likeliest LOGPROBS."""

    tokens: Tensor
    narrow: Tensor
    of_three: Tensor
    of_one: Tensor
    logprob_ids: Tensor
    logprobs: Tensor


LOGPROBS = 5


def draw(tp: TensorParallel) -> dict[str, Samples]:
    found = {}
    for name, logits in logits_to_sample().items():
        shard = -(-logits.shape[1] // tp.size)
        padded = F.pad(logits, (0, shard * tp.size - logits.shape[1]), value=-torch.inf)
        local = padded[:, tp.rank * shard : (tp.rank + 1) * shard]
        ids = VocabShard(tp, tp.rank * shard)

        def drawn(kinds: list[Row], wide: bool) -> Tensor:
            rows = len(kinds)
            params = row_tensors(kinds, 0, CPU)
            return sample(local[:rows], params, torch.arange(rows), ids, wide)  # noqa: B023

        narrow = list(NARROW.values())
        tokens = drawn(list(KINDS.values()), wide=True)
        found[name] = Samples(
            tokens,
            drawn(narrow, wide=False),
            drawn(narrow[:3], wide=True),
            drawn(narrow[-1:], wide=False),
            *logprobs(local, tokens, LOGPROBS, ids),
        )
    return found


def outlive_the_others(tp: TensorParallel) -> None:
    """They leave, and this rank does not wait for them for ever."""
    try:
        tp.all_reduce(torch.ones(1))
    except GroupBroken:
        return
    raise RuntimeError("a rank got its result alone")


def run_rank(rank: int, root: Path, cases: int) -> None:
    """Is this rank of every group that has it."""
    torch.set_num_threads(1)
    for size in SIZES:
        if rank < size:
            run_in_group(rank, size, root, cases)


def run_in_group(rank: int, size: int, root: Path, cases: int) -> None:
    """Writes the logits of SEQUENCES for each case, and what it draws.

    Connections last as long as something refers to the group: none may once this returns, or who
    outlives the others would not see that they are gone.
    """
    store = FileStore(f"{root}/rendezvous{size}", size)
    store.set_timeout(timedelta(seconds=60))
    tp = TensorParallel.connect(rank, size, store, CPU)
    if (least := tp.minimum(100 - rank, CPU)) != 101 - size:
        raise RuntimeError(f"the minimum over {size} ranks is {least}")
    for case in range(cases):
        model = load_model(checkpoint_directory(root, case), tp)
        found = PagedSequences(model, SEQUENCES, 16, tp).run(8)
        torch.save(torch.cat(found), logits_file(root, case, size, rank))
    torch.save(draw(tp), samples_file(root, size, rank))
    if size == 2 and rank == 0:
        outlive_the_others(tp)
    tp.close()
