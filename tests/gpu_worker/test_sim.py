"""The simulated device: its pace, its tokens, and that it does without torch."""

from __future__ import annotations

import random
import select
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.checkpoint import CheckpointError, ModelConfig
from nanovllm.messages import NO_TOKEN_LEFT, Admission, StepResult, pack, unpack
from nanovllm.protocol import Sampling
from nanovllm.services.gpu_worker.runner import Loaded, Runner
from nanovllm.services.gpu_worker.sim import SimDevice, SimRunner
from nanovllm.services.gpu_worker.sim_tokens import draw, ordinary_tokens
from nanovllm.settings import Settings, SettingsError
from tests.bpe import SPECIAL, tiny_tokenizer, write_checkpoint_files
from tests.gpu_worker.plans import Request, floats, outputs, random_schedule, step_plan

VOCABULARY = np.arange(100, 1100, dtype=np.int32)
SETTINGS = Settings(
    max_num_seqs=8,
    max_model_len=64,
    kvcache_block_size=4,
    sim_step_ms=0.01,
    runtime_dir="/nowhere",
)


def sampling(seed: int, logprobs: int | None = None) -> Sampling:
    return Sampling(seed=seed, logprobs=logprobs)


def results(runner: Runner, count: int) -> list[StepResult]:
    found: list[StepResult] = []
    while len(found) < count:
        readable, _, _ = select.select([runner.descriptor], [], [], 30)
        assert readable, f"{len(found)} of {count} results in 30 s"
        found += [report for report in runner.reports() if isinstance(report, StepResult)]
    return found


def test_tokens_that_are_ruled_out_do_not_come() -> None:
    runner = SimRunner(SETTINGS, VOCABULARY)
    asked = Sampling(
        seed=1,
        allowed_token_ids=[100, 101, 102, 5],
        bad_words=[[101]],
        stop_token_ids=[5, 102],
        min_tokens=3,
    )
    nothing = Sampling(seed=2, allowed_token_ids=[7], bad_words=[[7]])
    drawn: list[list[int]] = []
    schedule = step_plan(
        0,
        admit=[Admission(i, pack([1]), 1, pack([i]), 0, s) for i, s in enumerate((asked, nothing))],
        prefill=[(0, 0, 1), (1, 0, 1)],
    )
    runner.launch(schedule, {})
    for number in range(1, 20):
        runner.launch(step_plan(number, decode=[0, 1]), {})
    drawn = [unpack(result.token_ids).tolist() for result in results(runner, 20)]
    first, second = zip(*drawn, strict=True)
    assert set(first[:3]) == {100}
    assert set(first[3:]) == {100, 102, 5}
    assert set(second) == {NO_TOKEN_LEFT}


@given(st.lists(st.floats(0, 10, allow_nan=False), min_size=1), st.floats(0.001, 5))
def test_a_device_executes_one_step_after_the_other(gaps: list[float], step: float) -> None:
    device = SimDevice(step, start=100.0)
    now, free_at, idle = 100.0, 100.0, 0.0
    for gap in gaps:
        now += gap
        idle += max(0.0, now - free_at)
        free_at = max(now, free_at) + step
        found = device.launch(now)
        assert found.end == pytest.approx(free_at)
        assert found.busy == pytest.approx(found.end - 100.0 - idle, abs=1e-6)


def test_steps_are_reported_as_long_as_they_were_told_to_be() -> None:
    runner = SimRunner(SETTINGS, VOCABULARY)
    for number in range(50):
        runner.launch(step_plan(number), {})
    found = results(runner, 50)
    assert [result.number for result in found] == list(range(50))
    assert [result.busy_us for result in found] == [10 * (n + 1) for n in range(50)]
    assert all(result.at_us >= result.busy_us for result in found)


def run(requests: list[Request], rng: random.Random) -> list[list[int]]:
    schedule = random_schedule(requests, rng, slots=8, blocks=200, block_size=4, largest_chunk=5)
    runner = SimRunner(SETTINGS, VOCABULARY)
    for plan, _ in schedule:
        runner.launch(plan, {})
    return outputs(schedule, results(runner, len(schedule)), len(requests))


def test_tokens_depend_on_seed_and_position_alone() -> None:
    requests = [Request(list(range(1 + 3 * n)), 9, sampling(n % 4 - 2)) for n in range(16)]
    found = run(requests, random.Random(0))
    assert run(requests, random.Random(1)) == found
    assert [len(tokens) for tokens in found] == [9] * 16
    # Request 4 has the seed of request 0, and starts at position 13 instead of 1.
    (longer,) = run([Request([0], 21, sampling(-2))], random.Random(2))
    assert longer[:9] == found[0]
    assert longer[12:] == found[4]


def test_tokens_are_well_mixed() -> None:
    seeds = np.repeat(np.arange(-50, 50), 100)
    positions = np.tile(np.arange(100, dtype=np.int32), 100)
    drawn = draw(seeds, positions, 50)
    counts = np.bincount(drawn, minlength=50)
    # 10,000 draws of 50: chi-squared with 49 degrees of freedom exceeds 94.6 once in 10,000 times.
    assert ((counts - 200) ** 2 / 200).sum() < 94.6
    grid = drawn.reshape(100, 100)
    assert len({tuple(row) for row in grid}) == 100
    assert len({tuple(column) for column in grid.T}) == 100


def test_logprobs_have_the_chosen_token_first() -> None:
    runner = SimRunner(SETTINGS, VOCABULARY)
    admit = [
        Admission(slot, pack([1, 2]), 2, pack([slot]), 0, sampling(slot, logprobs))
        for slot, logprobs in enumerate((None, 0, 3))
    ]
    runner.launch(step_plan(0, admit=admit, prefill=[(0, 0, 2), (1, 0, 2), (2, 0, 2)]), {})
    (result,) = results(runner, 1)
    tokens = unpack(result.token_ids).tolist()
    assert [entry.row for entry in result.logprobs] == [1, 2]
    for entry, count in zip(result.logprobs, (0, 3), strict=True):
        ids, values = unpack(entry.logprobs.token_ids).tolist(), floats(entry.logprobs.values)
        assert len(ids) == len(values) == count + 1
        assert ids[0] == tokens[entry.row]
        assert (np.diff(values[1:]) < 0).all()
        assert np.exp(values[1:]).sum() <= 1
        assert set(ids) <= set(VOCABULARY.tolist())


def test_it_has_blocks_for_every_slot_unless_told_otherwise() -> None:
    (loaded,) = SimRunner(SETTINGS, VOCABULARY).reports()
    assert isinstance(loaded, Loaded)
    assert loaded.num_blocks == 8 * 16
    few = Settings(max_model_len=64, kvcache_block_size=4, num_kvcache_blocks=15)
    with pytest.raises(SettingsError, match=r"not enough memory.*--max-model-len to 60"):
        SimRunner(few, VOCABULARY)


def test_special_tokens_are_never_drawn(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    write_checkpoint_files(tmp_path, eos_token_id=[7, 8], vocab_size=390)
    ids = ordinary_tokens(tmp_path, ModelConfig.from_checkpoint(tmp_path))
    special = {tokenizer.token_to_id(token) for token in SPECIAL}
    assert set(ids.tolist()) == set(range(390)) - special - {7, 8}
    write_checkpoint_files(tmp_path, eos_token_id=0, vocab_size=1)
    with pytest.raises(CheckpointError, match="not special"):
        ordinary_tokens(tmp_path, ModelConfig.from_checkpoint(tmp_path))


def test_torch_is_not_imported() -> None:
    program = (
        "import sys, nanovllm.services.gpu_worker.process, nanovllm.services.gpu_worker.sim;"
        " sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
