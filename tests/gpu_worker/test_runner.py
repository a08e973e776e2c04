"""The executor and the torch runner on random checkpoints, driven by plans."""

from __future__ import annotations

import random
import select
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from nanovllm.checkpoint import ModelConfig
from nanovllm.messages import Admission, StepPlan, StepResult, pack, unpack
from nanovllm.protocol import Sampling
from nanovllm.services.gpu_worker import memory, startup
from nanovllm.services.gpu_worker.executor import Executor
from nanovllm.services.gpu_worker.graphs import Sizes
from nanovllm.services.gpu_worker.model.parallel import TensorParallel
from nanovllm.services.gpu_worker.runner import Loaded, Progress, Report
from nanovllm.services.gpu_worker.torch_runner import BusyMeter, TorchRunner
from nanovllm.settings import Settings, SettingsError
from tests.checkpoints import read_model, write_checkpoint
from tests.gpu_worker.paged import CPU
from tests.gpu_worker.plans import (
    GREEDY,
    Request,
    Scheduled,
    floats,
    outputs,
    random_schedule,
    step_plan,
)

VOCAB = 515
SETTINGS = Settings(
    device="cpu",
    max_num_seqs=6,
    max_num_batched_tokens=64,
    max_model_len=96,
    num_kvcache_blocks=40,
    kvcache_block_size=16,
    runtime_dir="/nowhere",
)


def settings(**overrides: Any) -> Settings:
    return msgspec.structs.replace(SETTINGS, **overrides)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), vocab_size=VOCAB)


def executor(directory: Path, used: Settings = SETTINGS) -> Executor:
    config = ModelConfig.from_checkpoint(directory)
    return startup.load(directory, config, used, CPU, TensorParallel(), lambda *_: None)[0]


def prompts(count: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        rng.choices(range(VOCAB), k=rng.choice((1, 2, 15, 16, 17, 40, 64))) for _ in range(count)
    ]


def schedule_of(requests: list[Request], seed: int, **overrides: int) -> list[Scheduled]:
    limits = {"slots": 6, "blocks": 40, "block_size": 16, "largest_chunk": 20, **overrides}
    return random_schedule(requests, random.Random(seed), **limits)


def execute(on: Executor, schedule: list[Scheduled]) -> list[StepResult]:
    return [on.step(plan).result(busy_us=0, at_us=0) for plan, _ in schedule]


def generate(on: Executor, requests: list[Request], seed: int, **overrides: int) -> list[list[int]]:
    schedule = schedule_of(requests, seed, **overrides)
    found = outputs(schedule, execute(on, schedule), len(requests))
    on.reset()
    return found


@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_greedy_tokens_equal_transformers(directory: Path, block_size: int) -> None:
    """In chunks, in mixed batches, with slots and blocks that are taken again, in any order."""
    blocks = 3 * -(-96 // block_size)
    used = settings(kvcache_block_size=block_size, num_kvcache_blocks=blocks)
    requests = [Request(prompt, 1 + 3 * n) for n, prompt in enumerate(prompts(10, seed=3))]
    found = generate(
        executor(directory, used), requests, seed=1, blocks=blocks, block_size=block_size
    )
    reference = read_model(directory)
    for request, tokens in zip(requests, found, strict=True):
        expected = reference.generate(
            torch.tensor([request.prompt]), max_new_tokens=request.max_tokens, do_sample=False
        )[0, len(request.prompt) :]
        assert tokens == expected.tolist()


def test_a_cached_prefix_is_not_computed_again(directory: Path) -> None:
    on = executor(directory)
    prompt = prompts(1, seed=8)[0][:1] * 40

    def first_token(number: int, slot: int, blocks: list[int], computed: int) -> int:
        admission = Admission(slot, pack(prompt), len(prompt), pack(blocks), computed, GREEDY)
        chunk = (slot, computed, len(prompt) - computed)
        sampled = on.step(step_plan(number, admit=[admission], prefill=[chunk]))
        return int(unpack(sampled.result(0, 0).token_ids)[0])

    expected = first_token(0, 0, [5, 9, 2], computed=0)
    assert first_token(1, 3, [5, 9, 7], computed=32) == expected


def test_a_seeded_request_is_the_same_alone_and_in_a_batch(directory: Path) -> None:
    on = executor(directory)
    rng = random.Random(5)
    requests = [
        Request(
            prompt,
            12,
            Sampling(
                temperature=rng.choice((0.0, 0.8, 1.5)),
                top_p=rng.choice((0.7, 1.0)),
                top_k=rng.choice((0, 20)),
                min_p=rng.choice((0.0, 0.05)),
                seed=rng.randrange(-(2**63), 2**63),
            ),
        )
        for prompt in prompts(10, seed=6)
    ]
    together = generate(on, requests, seed=7)
    assert together == generate(on, requests, seed=8)
    for n, request in enumerate(requests):
        assert generate(on, [request], seed=n) == [together[n]]
    # Preempted and resumed: the output so far comes back as part of the prompt.
    resumed = [
        Request(request.prompt + tokens[:7], 5, request.sampling)
        for request, tokens in zip(requests, together, strict=True)
    ]
    assert generate(on, resumed, seed=9) == [tokens[7:] for tokens in together]
    assert len({tuple(tokens) for tokens in together}) > 5


def test_logprobs_are_those_of_the_raw_logits(directory: Path) -> None:
    counts = [None, 0, 3, 20, None]
    requests = [
        Request(prompt, 4, Sampling(temperature=1.3, top_p=0.9, top_k=30, seed=n, logprobs=count))
        for n, (prompt, count) in enumerate(zip(prompts(5, seed=2), counts, strict=True))
    ]
    schedule = schedule_of(requests, seed=0)
    results = execute(executor(directory), schedule)
    found = outputs(schedule, results, len(requests))
    reference = read_model(directory)
    with torch.inference_mode():
        expected = [
            reference(torch.tensor([request.prompt + tokens])).logits[0].log_softmax(-1)
            for request, tokens in zip(requests, found, strict=True)
        ]
    seen = [0] * len(requests)
    for (_, owners), result in zip(schedule, results, strict=True):
        by_row = {entry.row: entry.logprobs for entry in result.logprobs}
        for row, owner in enumerate(owners):
            count = counts[owner]
            assert (row in by_row) == (count is not None)
            if count is not None:
                ids = unpack(by_row[row].token_ids).copy()
                values = floats(by_row[row].values)
                after = expected[owner][len(requests[owner].prompt) - 1 + seen[owner]]
                assert ids[0] == found[owner][seen[owner]]
                np.testing.assert_allclose(values, after[ids].numpy(), atol=1e-4)
                np.testing.assert_allclose(values[1:], after.topk(count).values, atol=1e-4)
            seen[owner] += 1


def test_a_plan_may_only_change_slots(directory: Path) -> None:
    on = executor(directory)
    on.step(step_plan(0, admit=[Admission(2, pack([1, 2, 3]), 3, pack([4]), 0, GREEDY)]))
    assert on.slots.used == 1
    (partial, whole) = (
        on.step(step_plan(1, prefill=[(2, 0, 2)])),
        on.step(step_plan(2, prefill=[(2, 2, 1)])),
    )
    assert unpack(partial.result(0, 0).token_ids).tolist() == []
    assert len(unpack(whole.result(0, 0).token_ids)) == 1
    assert unpack(on.step(step_plan(3, release=[2])).result(0, 0).token_ids).tolist() == []
    assert on.slots.used == 0


# The runner ---------------------------------------------------------------------------------------


def reports(runner: TorchRunner, until: type[Report] | None, count: int = 1) -> list[Any]:
    """Waits for `count` reports of a type; returns all that came."""
    found: list[Report] = []
    while sum(isinstance(report, until or object) for report in found) < count:
        readable, _, _ = select.select([runner.descriptor], [], [], 60)
        assert readable, f"only {found} in 60 s"
        found += runner.reports()
    return found


def test_plans_are_launched_ahead_of_their_results(directory: Path) -> None:
    requests = [Request(prompt, 6) for prompt in prompts(9, seed=4)]
    schedule = schedule_of(requests, seed=2)
    runner = TorchRunner(directory, ModelConfig.from_checkpoint(directory), SETTINGS, rank=0)
    *progress, loaded = reports(runner, Loaded)
    assert isinstance(loaded, Loaded)
    assert loaded.num_blocks == 40
    facts = "cpu, float32, sdpa attention, 40 blocks of 16 tokens, 0 MiB for logits processors"
    assert loaded.detail == facts
    assert all(isinstance(report, Progress) for report in progress)
    assert progress[-1].done == progress[-1].total > 0
    for plan, _ in schedule:
        runner.launch(plan, {})
    results = reports(runner, StepResult, len(schedule))
    assert outputs(schedule, results, 9) == generate(executor(directory), requests, seed=11)
    busy, at = [r.busy_us for r in results], [r.at_us for r in results]
    assert busy == sorted(busy)
    assert at == sorted(at)
    runner.reset()
    for plan, _ in schedule:
        runner.launch(plan, {})
    again = reports(runner, StepResult, len(schedule))
    assert [r.token_ids for r in again] == [r.token_ids for r in results]


def test_an_exception_in_the_device_thread_is_raised(directory: Path) -> None:
    runner = TorchRunner(directory, ModelConfig.from_checkpoint(directory), SETTINGS, rank=0)
    reports(runner, Loaded)
    runner.launch(step_plan(0, decode=[6]), {})
    with pytest.raises(IndexError):
        reports(runner, StepResult)


# Memory -------------------------------------------------------------------------------------------


def test_too_few_blocks_for_one_sequence(directory: Path) -> None:
    runner = TorchRunner(
        directory, ModelConfig.from_checkpoint(directory), settings(num_kvcache_blocks=5), rank=0
    )
    with pytest.raises(
        SettingsError,
        match=r"not enough memory for one sequence: there is room for 5 blocks, .* 6 blocks of 16"
        r" tokens .*lower --max-model-len to 80 or raise --num-kvcache-blocks",
    ):
        reports(runner, Loaded)


def test_no_more_blocks_than_the_slots_can_use() -> None:
    used = settings(num_kvcache_blocks=-1)
    assert memory.cpu_blocks(used, block_bytes=1) == 6 * 6
    limit = memory.cpu_blocks(used, block_bytes=memory.CPU_LIMIT // 4)
    assert limit <= 4
    halved = settings(num_kvcache_blocks=-1, tensor_parallel_size=2)
    assert memory.cpu_blocks(halved, block_bytes=memory.CPU_LIMIT // 4) == limit // 2


def test_cuda_blocks_leave_room_for_the_largest_step() -> None:
    used = settings(gpu_memory_utilization=0.5)
    assert memory.cuda_blocks(used, block_bytes=10, total=2000, used=300, peak=100) == 60
    assert memory.cuda_blocks(used, block_bytes=10, total=2000, used=1500, peak=100) == 0


@pytest.mark.parametrize("max_model_len", [2, 30, 96])
def test_the_largest_steps_can_be_run(directory: Path, max_model_len: int) -> None:
    used = settings(max_model_len=max_model_len, num_kvcache_blocks=6)
    on = executor(directory, used)
    for plan in startup.largest_steps(used):
        chunks = unpack(plan.prefill).reshape(-1, 3)
        assert chunks[:, 2].sum() <= used.max_num_batched_tokens
        sampled = on.step(plan).result(0, 0)
        assert len(unpack(sampled.token_ids)) == len(chunks)
        on.reset()


class Tried:
    """A double of an executor, where there is no GPU: remembers the steps it is given."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def capture_graphs(self, sizes: Sizes, _: object, progress: Callable[[int, int], None]) -> None:
        progress(0, sizes.total)
        for done in range(sizes.total):
            self.ran.append("graph")
            progress(done + 1, sizes.total)

    def step(self, plan: StepPlan) -> Tried:
        self.ran.append("step")
        return self

    def wait(self) -> None:
        pass

    def reset(self) -> None:
        pass


@pytest.mark.parametrize(
    ("graphs", "ran"),
    [(False, ["step"] * 2), (True, ["graph"] * 2 + ["step"] * 2)],
)
def test_it_is_told_how_much_has_been_tried_to_know_the_memory_it_takes(
    monkeypatch: pytest.MonkeyPatch, graphs: bool, ran: list[str]
) -> None:
    for name, value in (("mem_get_info", (1 << 20, 1 << 20)), ("empty_cache", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda _: 0)
    monkeypatch.setattr(startup, "CudaCapture", lambda _: None)
    tried = Tried()
    told: list[tuple[int, int, int]] = []
    blocks = startup._blocks_on_cuda(
        lambda _: tried,  # type: ignore[arg-type, return-value]
        settings(gpu_memory_utilization=0.5),
        CPU,
        1 << 10,
        graphs,
        lambda done, total: told.append((len(tried.ran), done, total)),
    )
    assert tried.ran == ran
    assert sorted(set(told)) == [(done, done, len(ran)) for done in range(len(ran) + 1)]
    assert blocks == 512


def test_busy_time_is_that_with_work_launched() -> None:
    meter = BusyMeter()
    meter.launched(1.0)
    meter.launched(1.5)
    assert meter.finished(2.0) == 1.0
    assert meter.finished(3.0) == 2.0
    meter.launched(7.0)
    assert meter.finished(7.5) == 2.5
