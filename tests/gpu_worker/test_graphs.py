"""CUDA graphs: the numbers of rows that are captured, and steps replayed against steps launched."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.checkpoint import ModelConfig
from nanovllm.messages import Sampling
from nanovllm.services.gpu_worker import bring_up
from nanovllm.services.gpu_worker.graphs import graph_sizes
from nanovllm.services.gpu_worker.model.parallel import TensorParallel
from nanovllm.settings import Settings
from tests.checkpoints import write_checkpoint
from tests.gpu_worker.plans import Request, outputs, random_schedule

SETTINGS = Settings(
    device="cuda",
    dtype="float32",
    max_num_seqs=40,
    max_num_batched_tokens=512,
    max_model_len=256,
    num_kvcache_blocks=400,
    kvcache_block_size=16,
    runtime_dir="/nowhere",
)


@given(st.integers(1, 2000))
def test_a_step_of_many_rows_is_hardly_padded(most: int) -> None:
    sizes = graph_sizes(most)
    assert sizes[0] == 1
    assert sizes[-1] == most
    for size, larger in pairwise(sizes):
        assert size < larger <= max(size + 8, size * 1.25)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_replayed_steps_sample_what_launched_steps_do(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint", vocab_size=515, head_dim=64)
    rng = random.Random(3)
    requests = [
        Request(
            rng.choices(range(515), k=rng.choice((1, 16, 17, 100))),
            rng.randint(1, 60),
            Sampling(
                temperature=rng.choice((0.0, 0.8)),
                top_p=rng.choice((0.7, 1.0)),
                top_k=rng.choice((0, 20)),
                min_p=rng.choice((0.0, 0.05)),
                seed=n,
                logprobs=rng.choice((None, 3)),
            ),
        )
        for n in range(60)
    ]
    schedule = random_schedule(
        requests, random.Random(1), slots=40, blocks=400, block_size=16, largest_chunk=50
    )
    found = []
    for enforce_eager in (False, True):
        used = msgspec.structs.replace(SETTINGS, enforce_eager=enforce_eager)
        config = ModelConfig.from_checkpoint(directory)
        device = torch.device("cuda", 0)
        loaded = bring_up.load(directory, config, used, device, TensorParallel(), lambda *_: None)
        sampled = [loaded.executor.step(plan) for plan, _ in schedule]
        for step in sampled:
            step.wait()
        results = [step.result(busy_us=0, at_us=0) for step in sampled]
        found.append(outputs(schedule, results, len(requests)))
    assert found[0] == found[1]
