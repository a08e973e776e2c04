"""Tensor parallelism over real processes (gloo): the same logits, and the same tokens drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from nanovllm.kernels.sampling import reference
from nanovllm.kernels.sampling.reference import SamplingTensors
from nanovllm.services.gpu_worker.model.parallel import TensorParallel
from nanovllm.services.gpu_worker.runner import GroupBroken
from tests.checkpoints import read_model, write_checkpoint
from tests.gpu_worker.paged import CPU, relative_error
from tests.gpu_worker.ranks import run_ranks
from tests.gpu_worker.tp_rank import (
    LOGPROBS,
    SEQUENCES,
    SIZES,
    checkpoint_directory,
    logits_file,
    logits_to_sample,
    run_rank,
    run_steps,
    run_steps_on_gpu,
    samples_file,
    steps_directory,
    steps_file,
)
from tests.kernels.drawn import BY_SHORTLISTS, KINDS, Row, count_other, row_tensors

# Two key/value heads unless said otherwise: with four ranks they are replicated.
CASES: dict[str, dict[str, Any]] = {
    "untied, vocabulary not divided": {"vocab_size": 515},
    "tied": {"tie_word_embeddings": True, "vocab_size": 517},
    "bias, one key/value head": {"attention_bias": True, "num_key_value_heads": 1},
    "qwen2": {"family": "qwen2"},
    "eight key/value heads, three files": {"num_key_value_heads": 8, "shards": 3},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tp")
    for case, overrides in enumerate(CASES.values()):
        write_checkpoint(checkpoint_directory(root, case), **overrides)
    write_checkpoint(steps_directory(root), vocab_size=515, num_hidden_layers=1)
    with pytest.MonkeyPatch.context() as patch:
        # These ranks run on the CPU wherever they are, with Triton's interpreter.
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("TRITON_INTERPRET", "1")
        run_ranks(run_rank, max(SIZES), root, len(CASES))
    return root


@pytest.mark.filterwarnings("error")
def test_collectives_warn_of_nothing() -> None:
    """What torch has to say to programmers would stand in users' logs."""
    tp = TensorParallel.connect(0, 1, HashStore(), CPU)
    x = torch.arange(6.0).reshape(2, 3)
    try:
        assert torch.equal(tp.all_gather(x), x)
        assert torch.equal(tp.all_reduce(x.clone()), x)
        assert torch.equal(tp.all_to_all(x[None]), x[None])
        assert tp.minimum(7, CPU) == 7
    finally:
        tp.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", range(len(CASES)), ids=list(CASES))
def test_logits_equal_transformers_on_every_rank(root: Path, case: int, size: int) -> None:
    reference = read_model(checkpoint_directory(root, case))
    with torch.inference_mode():
        expected = torch.cat([reference(torch.tensor([s])).logits[0] for s in SEQUENCES])
    found = [torch.load(logits_file(root, case, size, rank)) for rank in range(size)]
    assert relative_error(found[0], expected) < 1e-4
    assert all(torch.equal(logits, found[0]) for logits in found[1:])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", logits_to_sample())
def test_every_rank_draws_the_reference_s_tokens(root: Path, name: str, size: int) -> None:
    logits = logits_to_sample()[name]
    found = [
        torch.load(samples_file(root, size, rank), weights_only=False)[name] for rank in range(size)
    ]
    for others in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(others, found[0], strict=True))

    def whole(kinds: list[Row]) -> tuple[Tensor, SamplingTensors, Tensor]:
        rows = len(kinds)
        return logits[:rows], row_tensors(kinds, 0, CPU), torch.arange(rows)

    assert torch.equal(found[0].tokens, reference.sample(*whole(list(KINDS.values()))))
    by_shortlists = list(BY_SHORTLISTS.values())
    other = count_other(found[0].by_shortlists, *whole(by_shortlists))
    other += count_other(found[0].of_one, *whole(by_shortlists[-1:]))
    # The edge of top-p falls on a token only where weights are equal.
    assert other == 0 or name in ("ties", "equal")


@pytest.mark.parametrize("size", SIZES)
def test_logprobs_of_a_sharded_vocabulary(root: Path, size: int) -> None:
    for name, found in torch.load(samples_file(root, size, 0), weights_only=False).items():
        expected = logits_to_sample()[name].double().log_softmax(dim=-1)
        torch.testing.assert_close(
            found.logprobs.double(), expected.gather(1, found.logprob_ids), rtol=1e-5, atol=1e-5
        )
        assert torch.equal(found.logprob_ids[:, 0], found.tokens)
        likeliest = expected.topk(LOGPROBS, dim=-1).values
        torch.testing.assert_close(found.logprobs[:, 1:].double(), likeliest, rtol=1e-5, atol=1e-5)
        distinct = [len(set(row)) for row in found.logprob_ids[:, 1:].tolist()]
        assert distinct == [LOGPROBS] * len(distinct)


def test_rows_drawn_again_go_on_with_what_was_drawn(root: Path) -> None:
    """In steps that are replayed and in steps that are not, as without tensor parallelism."""
    expected = run_steps(root, TensorParallel(), replayed=False)
    for rank in range(2):
        replayed, launched = torch.load(steps_file(root, 2, rank))
        assert replayed == launched == expected


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("size", SIZES)
def test_rows_drawn_again_on_gpus(tmp_path: Path, size: int) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"fewer than {size} GPUs")
    write_checkpoint(
        steps_directory(tmp_path),
        vocab_size=515,
        num_hidden_layers=1,
        num_key_value_heads=4,
        head_dim=64,
    )
    run_ranks(run_steps_on_gpu, size, tmp_path, size)
    found = [torch.load(steps_file(tmp_path, size, rank)) for rank in range(size)]
    for replayed, launched in found:
        assert replayed == launched == found[0][0]


def test_a_collective_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: RuntimeError) -> None:
        def all_reduce(*args: object, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr(dist, "all_reduce", all_reduce)

    group: Any = object()  # stands for one that fails
    tp = TensorParallel(0, 2, group)
    failing(RuntimeError("NCCL error in NCCLUtils.cpp\nLast error:\nno route to rank 1\n"))
    with pytest.raises(GroupBroken, match="Last error:; no route to rank 1"):
        tp.all_reduce(torch.zeros(1))
    # This rank's own fault, not another's.
    failing(torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        tp.all_reduce(torch.zeros(1))
