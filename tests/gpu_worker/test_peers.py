"""Sums and gathers over peer memory: on every rank the same bits, and what the reference says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu_worker import peer_rank
from tests.gpu_worker.ranks import run_ranks

GPUS = torch.cuda.device_count()


@pytest.mark.parametrize("ranks", [2, 3, 4] if peer_rank.ON_CUDA else [3])
def test_ranks_exchange_rows(tmp_path: Path, ranks: int) -> None:
    if peer_rank.ON_CUDA and ranks > GPUS:
        pytest.skip(f"fewer than {ranks} GPUs")
    run_ranks(peer_rank.run, ranks, ranks, tmp_path)
    first, *others = (torch.load(tmp_path / f"results-{rank}.pt") for rank in range(ranks))
    assert first
    for results in others:
        assert all(torch.equal(x, y) for x, y in zip(results, first, strict=True))
