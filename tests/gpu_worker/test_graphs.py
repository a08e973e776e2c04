"""Steps that are replayed: which are captured, how others fit into them, and what they sample."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.checkpoint import ModelConfig
from nanovllm.kernels.attention.choose import ByPhaseBackend
from nanovllm.kernels.attention.triton_decode import TritonDecodeBackend
from nanovllm.kernels.attention.triton_prefill import TritonPrefillBackend
from nanovllm.messages import Admission
from nanovllm.protocol import Sampling
from nanovllm.services.gpu_worker import startup
from nanovllm.services.gpu_worker.executor import Executor
from nanovllm.services.gpu_worker.graphs import (
    FEWEST_CHUNKS,
    MOST_CHUNKS,
    TOKENS_PER_CHUNK,
    Sizes,
    StepGraphs,
    graph_sizes,
)
from nanovllm.services.gpu_worker.model.parallel import TensorParallel
from nanovllm.services.gpu_worker.slots import Layout, SlotTable
from nanovllm.services.gpu_worker.startup import allocate_kv_cache, attention_shape
from nanovllm.services.gpu_worker.steps import StepOutput
from nanovllm.settings import Settings
from tests.checkpoints import write_checkpoint
from tests.gpu_worker.paged import CPU, RunAgain, load_model
from tests.gpu_worker.plans import (
    ASKED,
    END,
    GRAMMARS,
    GREEDY,
    Request,
    Scheduled,
    constrain,
    floats,
    outputs,
    random_schedule,
    step_plan,
)

DEVICE = torch.device("cuda") if torch.cuda.is_available() else CPU
SETTINGS = Settings(
    device="cuda",
    dtype="float32",
    max_num_seqs=40,
    max_num_batched_tokens=512,
    max_prefill_tokens=200,
    max_model_len=256,
    num_kvcache_blocks=400,
    kvcache_block_size=16,
    runtime_dir="/nowhere",
)


@given(st.integers(1, 2000), st.integers(1, 10_000))
def test_a_step_is_hardly_padded(max_num_seqs: int, max_prefill_tokens: int) -> None:
    sizes = graph_sizes(max_num_seqs, max_prefill_tokens)
    assert sizes.decodes[0] == 1
    assert sizes.decodes[-1] == max_num_seqs
    for size, larger in pairwise(sizes.decodes):
        assert size < larger <= max(size + 8, size * 1.25)
    tokens = sorted({layout.tokens for layout in sizes.mixed})
    assert tokens[-1] == max_prefill_tokens
    for size, larger in pairwise(tokens):
        assert size < larger <= (2 * size if size >= 2048 else size + 256)
    for layout in sizes.mixed:
        asked = max(FEWEST_CHUNKS, layout.tokens // TOKENS_PER_CHUNK)
        assert layout.chunks == min(asked, MOST_CHUNKS, max_num_seqs)
        assert layout.samples == min(layout.decodes + layout.chunks, max_num_seqs)
    assert max_num_seqs in {layout.decodes for layout in sizes.mixed}


def random_requests(count: int, longest_output: int, seed: int) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            rng.choices(range(515), k=rng.choice((1, 16, 17, 60))),
            rng.randint(1, longest_output),
            Sampling(
                temperature=rng.choice((0.0, 0.8)),
                top_p=rng.choice((0.7, 1.0)),
                top_k=rng.choice((0, 20)),
                min_p=rng.choice((0.0, 0.05)),
                frequency_penalty=rng.choice((0.0, 0.0, 1.2)),
                seed=n,
                logprobs=rng.choice((None, 3)),
            ),
        )
        for n in range(count)
    ]


def execute(on: Executor, schedule: list[Scheduled], requests: int) -> list[list[int]]:
    """Every third request has a grammar. No step waits for the host to see a result."""
    sampled = [on.step(plan, constrain(plan)) for plan, _ in schedule]
    for step in sampled:
        step.wait()
    results = [step.result(busy_us=0, at_us=0) for step in sampled]
    found = outputs(schedule, results, requests)
    for tokens in found[::3]:
        end = tokens.index(END) + 1 if END in tokens else len(tokens)
        GRAMMARS.matcher(ASKED, None, tokens[:end])
    return found


def replayed_and_exact(
    tmp_path: Path, requests: list[Request], schedule: list[Scheduled], sizes: Sizes
) -> tuple[list[list[list[int]]], RunAgain]:
    """The outputs of steps that are replayed where they fit, and of steps that are not."""
    directory = write_checkpoint(
        tmp_path / "checkpoint", vocab_size=515, num_hidden_layers=1, num_attention_heads=4
    )
    used = msgspec.structs.replace(SETTINGS, max_num_seqs=5, max_model_len=96)
    model = load_model(directory, device=DEVICE)
    shape = attention_shape(model.config, TensorParallel(), 16)
    backend = ByPhaseBackend(TritonDecodeBackend(shape), TritonPrefillBackend(shape))
    capture = RunAgain()
    found = []
    for replayed in (True, False):
        cache = allocate_kv_cache(model.config, shape, 40, torch.float32, DEVICE)
        executor = Executor(model, backend, cache, used, DEVICE)
        if replayed:
            executor.capture_graphs(sizes, capture, lambda done, total: None)
        found.append(execute(executor, schedule, len(requests)))
    return found, capture


def test_padded_steps_sample_what_exact_ones_do(tmp_path: Path) -> None:
    requests = random_requests(8, 6, seed=4)
    schedule = random_schedule(
        requests, random.Random(2), slots=5, blocks=40, block_size=16, largest_chunk=25
    )
    sizes = Sizes([2, 5], [Layout(5, 3, tokens, 8) for tokens in (30, 60)])
    found, capture = replayed_and_exact(tmp_path, requests, schedule, sizes)
    assert found[0] == found[1]
    replayed = sum(number < sizes.total for number in capture.replayed)
    assert len(schedule) // 2 < replayed < len(schedule), "some steps fit, and some do not"


def test_masked_rows_are_drawn_again_in_a_replay_of_their_own(tmp_path: Path) -> None:
    """By graphs with room for more rows, beside rows that have a mask and penalties."""
    requests = [
        request._replace(
            sampling=Sampling(
                temperature=request.sampling.temperature,
                top_k=request.sampling.top_k,
                frequency_penalty=0.0 if number % 6 else 1.5,
                seed=3 * number,
                logprobs=3,
            )
        )
        for number, request in enumerate(random_requests(14, 6, seed=6))
    ]
    schedule = random_schedule(
        requests, random.Random(4), slots=5, blocks=40, block_size=16, largest_chunk=25
    )
    found, capture = replayed_and_exact(
        tmp_path, requests, schedule, Sizes([5], [Layout(5, 5, 5 * 25, 10)])
    )
    assert found[0] == found[1]
    masked = [sum(owner % 6 > 0 for owner in owners) for _, owners in schedule]
    processed = [sum(owner % 6 == 0 for owner in owners) for _, owners in schedule]
    assert len(capture.replayed) == len(schedule) + np.count_nonzero(masked + processed)
    assert any(count in (2, 3) for count in masked), "a graph has room for more"
    assert (np.array(masked) * processed).any(), "a step has both"


def test_processed_rows_are_drawn_again_in_a_replay_of_their_own(tmp_path: Path) -> None:
    """By graphs with room for more rows, which draw some twice but count them once."""
    used = {"frequency_penalty": 1.5, "repetition_penalty": 1.3, "min_tokens": 3}
    requests = [
        request._replace(sampling=msgspec.structs.replace(request.sampling, **used, logprobs=None))
        for request in random_requests(6, 6, seed=5)
    ]
    schedule = random_schedule(
        requests, random.Random(3), slots=5, blocks=40, block_size=16, largest_chunk=25
    )
    sizes = Sizes([5], [Layout(5, 5, 5 * 25, 10)])
    found, capture = replayed_and_exact(tmp_path, requests, schedule, sizes)
    assert found[0] == found[1]
    sampling_steps = sum(bool(owners) for _, owners in schedule)
    assert len(capture.replayed) == len(schedule) + sampling_steps
    drawn = {len(owners) for _, owners in schedule}
    assert drawn & {2, 3}, "a graph has room for more"


def telling_graphs(
    sizes: Sizes, max_num_seqs: int, progress: Callable[[int, int], None], capture: RunAgain
) -> StepGraphs:
    """The tokens of a replayed step tell its graph: the number of decodes that the graph has room
    for, or the number of chunk tokens if it is the graph of a mixed step."""

    def ran(rows: int, told: int) -> StepOutput:
        return StepOutput(torch.full((rows,), told), torch.empty(rows), torch.zeros(rows))

    return StepGraphs(
        lambda slots: ran(len(slots), len(slots)),
        lambda _, layout: ran(layout.samples, layout.tokens),
        sizes,
        max_num_seqs,
        CPU,
        capture,
        progress,
    )


def test_the_smallest_graph_with_room_is_replayed() -> None:
    sizes = graph_sizes(8, 200)
    reported: list[tuple[int, int]] = []
    capture = RunAgain()
    graphs = telling_graphs(sizes, 8, lambda *done: reported.append(done), capture)
    assert sizes.total == 4 + 2
    assert reported == [(done, sizes.total) for done in range(sizes.total + 1)]
    assert capture.captured == sizes.total

    table = SlotTable(8)
    for slot, length, size in ((0, 1, 128), (1, 150, 200), (2, 128, 128)):
        admitted = Admission(slot, bytes(4 * length), length, bytes(4), 0, GREEDY)
        batch = table.apply(step_plan(0, admit=[admitted], prefill=[(slot, 0, length)]))
        decoded = graphs.replay(batch)
        assert decoded is not None
        assert decoded.token_ids.tolist() == [size]
    for slots, size in (([0], 1), ([1, 0], 2), ([1, 2, 0], 4), ([2], 1)):
        decoded = graphs.replay(table.apply(step_plan(0, decode=slots)))
        assert decoded is not None
        assert decoded.token_ids.tolist() == [size] * len(slots)


@pytest.mark.parametrize(
    ("prompts", "length", "size"),
    [(120, 17, 2048), (64, 8, 512), (65, 15, 1024), (100, 5, 1024), (33, 2, 512), (129, 15, None)],
)
def test_many_short_prompts_are_computed_in_one_replay(
    prompts: int, length: int, size: int | None
) -> None:
    graphs = telling_graphs(graph_sizes(200, 2048), 200, lambda *_: None, RunAgain())
    admitted = [
        Admission(slot, bytes(4 * length), length, bytes(4), 0, GREEDY) for slot in range(prompts)
    ]
    chunks = [(slot, 0, length) for slot in range(prompts)]
    decoded = graphs.replay(SlotTable(200).apply(step_plan(0, admit=admitted, prefill=chunks)))
    assert (None if decoded is None else decoded.token_ids.tolist()) == (size and [size] * prompts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_replayed_steps_sample_what_launched_steps_do(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint", vocab_size=515, head_dim=64)
    requests = random_requests(60, 60, seed=3)
    schedule = random_schedule(
        requests, random.Random(1), slots=40, blocks=400, block_size=16, largest_chunk=50
    )
    found = []
    for enforce_eager in (False, True):
        used = msgspec.structs.replace(SETTINGS, enforce_eager=enforce_eager)
        config = ModelConfig.from_checkpoint(directory)
        device = torch.device("cuda", 0)
        executor, _ = startup.load(
            directory, config, used, device, TensorParallel(), lambda *_: None
        )
        found.append(execute(executor, schedule, len(requests)))
    assert found[0] == found[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_replayed_prefills_come_to_the_same_logits_in_bfloat16(tmp_path: Path) -> None:
    """With whatever attention is chosen for prefills; tokens might differ by rounding."""
    directory = write_checkpoint(tmp_path / "checkpoint", vocab_size=515, head_dim=128)
    sampling = Sampling(temperature=0.0, seed=0, logprobs=5)
    rng = random.Random(5)
    requests = [
        Request(rng.choices(range(515), k=rng.randint(1, 200)), 1, sampling) for _ in range(20)
    ]
    schedule = random_schedule(
        requests, random.Random(6), slots=8, blocks=20, block_size=256, largest_chunk=60
    )
    found = []
    for enforce_eager in (False, True):
        used = msgspec.structs.replace(
            SETTINGS,
            dtype="bfloat16",
            enforce_eager=enforce_eager,
            kvcache_block_size=256,
            num_kvcache_blocks=20,
        )
        config = ModelConfig.from_checkpoint(directory)
        device = torch.device("cuda", 0)
        executor, _ = startup.load(
            directory, config, used, device, TensorParallel(), lambda *_: None
        )
        sampled = [executor.step(plan) for plan, _ in schedule]
        for step in sampled:
            step.wait()
        rows = [row for step in sampled for row in step.result(0, 0).logprobs]
        found.append(torch.stack([torch.from_numpy(floats(row.logprobs.values)) for row in rows]))
    torch.testing.assert_close(found[0], found[1], rtol=0.02, atol=0.05)
