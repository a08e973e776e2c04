"""Tensor parallelism over real processes (gloo): the same logits, on every rank."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import read_model, write_checkpoint
from tests.gpu_worker.paged import relative_error
from tests.gpu_worker.tp_rank import (
    SEQUENCES,
    SIZES,
    checkpoint_directory,
    logits_file,
    run_rank,
)

# Two key/value heads unless said otherwise: with four ranks they are replicated.
CASES: dict[str, dict[str, Any]] = {
    "untied, vocabulary not divided": {"vocab_size": 515},
    "tied": {"tie_word_embeddings": True, "vocab_size": 517},
    "bias, one key/value head": {"attention_bias": True, "num_key_value_heads": 1},
    "eight key/value heads, three files": {"num_key_value_heads": 8, "shards": 3},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tp")
    for case, overrides in enumerate(CASES.values()):
        write_checkpoint(checkpoint_directory(root, case), **overrides)
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=run_rank, args=(rank, root, len(CASES)))
        for rank in range(max(SIZES))
    ]
    deadline = time.monotonic() + 90
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout=max(0, deadline - time.monotonic()))
        assert [process.exitcode for process in ranks] == [0] * len(ranks)
    finally:
        for process in ranks:
            process.kill()
    return root


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", range(len(CASES)), ids=list(CASES))
def test_logits_equal_transformers_on_every_rank(root: Path, case: int, size: int) -> None:
    reference = read_model(checkpoint_directory(root, case))
    with torch.inference_mode():
        expected = torch.cat([reference(torch.tensor([s])).logits[0] for s in SEQUENCES])
    found = [torch.load(logits_file(root, case, size, rank)) for rank in range(size)]
    assert relative_error(found[0], expected) < 1e-4
    assert all(torch.equal(logits, found[0]) for logits in found[1:])
