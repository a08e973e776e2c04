"""What each process of test_tp does; apart, so that the ranks need not import transformers."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from nanovllm.services.gpu_worker.model.parallel import TensorParallel
from tests.gpu_worker.paged import CPU, PagedSequences, load_model

SIZES = (2, 4)
SEQUENCES = [[3, 141, 59, 26, 5, 358, 97, 93, 238], list(range(60, 99)), [514]]


def checkpoint_directory(root: Path, case: int) -> Path:
    return root / f"checkpoint{case}"


def logits_file(root: Path, case: int, size: int, rank: int) -> Path:
    return root / f"logits-{case}-{size}-{rank}.pt"


def run_rank(rank: int, root: Path, cases: int) -> None:
    """Is this rank of every group that has it: writes the logits of SEQUENCES for each case."""
    torch.set_num_threads(1)
    for size in SIZES:
        if rank >= size:
            continue
        store = FileStore(f"{root}/rendezvous{size}", size)
        store.set_timeout(timedelta(seconds=60))
        tp = TensorParallel.connect(rank, size, store, CPU)
        if (least := tp.minimum(100 - rank, CPU)) != 101 - size:
            raise RuntimeError(f"the minimum over {size} ranks is {least}")
        for case in range(cases):
            model = load_model(checkpoint_directory(root, case), tp)
            found = PagedSequences(model, SEQUENCES, 16, tp).run(8)
            torch.save(torch.cat(found), logits_file(root, case, size, rank))
        tp.close()
