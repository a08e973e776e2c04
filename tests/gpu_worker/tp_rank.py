"""What each process of test_tp does; apart, so that the ranks need not import transformers."""

from __future__ import annotations

import random
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

from nanovllm.checkpoint import ModelConfig
from nanovllm.kernels.attention.interface import AttentionBackend, AttentionShape
from nanovllm.kernels.attention.sdpa import SdpaBackend
from nanovllm.kernels.sampling.reference import SamplingTensors
from nanovllm.messages import unpack
from nanovllm.protocol import Sampling
from nanovllm.services.gpu_worker import startup
from nanovllm.services.gpu_worker.executor import Executor
from nanovllm.services.gpu_worker.graphs import Sizes
from nanovllm.services.gpu_worker.model.parallel import TensorParallel, VocabShard
from nanovllm.services.gpu_worker.runner import GroupBroken
from nanovllm.services.gpu_worker.sampling import logprobs, sample, sample_whole
from nanovllm.services.gpu_worker.slots import Layout
from nanovllm.services.gpu_worker.startup import allocate_kv_cache, attention_shape
from nanovllm.settings import Settings
from tests.gpu_worker.paged import CPU, PagedSequences, RunAgain, load_model
from tests.gpu_worker.plans import Request, Scheduled, constrain, random_schedule
from tests.kernels.drawn import BY_SHORTLISTS, KINDS, Row, row_tensors

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
    """From logits of `logits_to_sample`: the tokens of rows of all KINDS, drawn from whole logits,
    of rows BY_SHORTLISTS, and of one of these; and the log-probabilities of the first, each with
    those of the likeliest LOGPROBS."""

    tokens: Tensor
    by_shortlists: Tensor
    of_one: Tensor
    logprob_ids: Tensor
    logprobs: Tensor


LOGPROBS = 5


def draw(tp: TensorParallel) -> dict[str, Samples]:
    found = {}
    for name, logits in logits_to_sample().items():
        shard = -(-logits.shape[1] // tp.size)
        padded = F.pad(logits, (0, shard * tp.size - logits.shape[1]), value=-torch.inf)
        local = padded[:, tp.rank * shard : (tp.rank + 1) * shard].contiguous()
        ids = VocabShard(tp, tp.rank * shard)

        def drawn(kinds: list[Row]) -> Tensor:
            rows = len(kinds)
            params = row_tensors(kinds, 0, CPU)
            return sample(local[:rows], params, torch.arange(rows), ids)  # noqa: B023

        share = len(KINDS) // tp.size
        own = slice(tp.rank * share, (tp.rank + 1) * share)
        params = SamplingTensors(*(of[own] for of in row_tensors(list(KINDS.values()), 0, CPU)))
        tokens = sample_whole(local, params, torch.arange(len(KINDS))[own], ids)
        by_shortlists = list(BY_SHORTLISTS.values())
        found[name] = Samples(
            tokens,
            drawn(by_shortlists),
            drawn(by_shortlists[-1:]),
            *logprobs(local, tokens, LOGPROBS, ids),
        )
    return found


def steps_directory(root: Path) -> Path:
    return root / "steps"


def steps_file(root: Path, size: int, rank: int) -> Path:
    return root / f"steps-{size}-{rank}.pt"


def scheduled_steps() -> list[Scheduled]:
    """Of requests some of whose rows need whole logits, or have their logits processed: often not
    as many as there are ranks. Some have a grammar, see `plans.constrain`."""
    rng = random.Random(3)
    samplings = [
        Sampling(top_p=0.9),
        Sampling(top_k=100),
        Sampling(top_k=20),
        Sampling(min_p=0.05),
        Sampling(),
        Sampling(top_p=0.9, frequency_penalty=1.5),
        Sampling(repetition_penalty=1.5),
    ]
    requests = [
        Request(
            rng.choices(range(515), k=rng.randint(1, 20)),
            rng.randint(2, 5),
            msgspec.structs.replace(sampling, temperature=0.8, seed=number, logprobs=2),
        )
        for number, sampling in enumerate(samplings)
    ]
    return random_schedule(requests, rng, slots=4, blocks=12, block_size=16, largest_chunk=15)


def triton_backend(shape: AttentionShape) -> AttentionBackend:
    # Imported where it is used: it takes its time, and most ranks do not.
    import tests.interpreter  # noqa: F401
    from nanovllm.kernels.attention.choose import ByPhaseBackend
    from nanovllm.kernels.attention.triton_decode import TritonDecodeBackend
    from nanovllm.kernels.attention.triton_prefill import TritonPrefillBackend

    return ByPhaseBackend(TritonDecodeBackend(shape), TritonPrefillBackend(shape))


def run_steps(root: Path, tp: TensorParallel, replayed: bool) -> list[list[int]]:
    """Of each step, the tokens, and then those that log-probabilities were given of."""
    settings = Settings(max_num_seqs=4, max_model_len=32, kvcache_block_size=16)
    model = load_model(steps_directory(root), tp)
    shape = attention_shape(model.config, tp, 16)
    cache = allocate_kv_cache(model.config, shape, 12, torch.float32, CPU)
    backend = triton_backend(shape) if replayed else SdpaBackend(shape)
    executor = Executor(model, backend, cache, settings, CPU)
    if replayed:
        sizes = Sizes([2, 4], [Layout(4, 3, 20, 7)])
        executor.capture_graphs(sizes, RunAgain(), lambda done, total: None)
    return sampled_by(executor)


def run_steps_on_gpu(rank: int, root: Path, size: int) -> None:
    """Writes what `run_steps` returns, of a GPU for each rank: replayed and launched."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = FileStore(f"{root}/rendezvous-gpu", size)
    store.set_timeout(timedelta(seconds=60))
    tp = TensorParallel.connect(rank, size, store, device)
    config = ModelConfig.from_checkpoint(steps_directory(root))
    both = []
    for enforce_eager in (False, True):
        settings = Settings(
            device="cuda",
            dtype="float32",
            tensor_parallel_size=size,
            enforce_eager=enforce_eager,
            max_num_seqs=4,
            max_num_batched_tokens=64,
            max_prefill_tokens=20,
            max_model_len=32,
            num_kvcache_blocks=12,
            kvcache_block_size=16,
        )
        executor, _ = startup.load(
            steps_directory(root), config, settings, device, tp, lambda *_: None
        )
        both.append(sampled_by(executor))
    torch.save(both, steps_file(root, size, rank))


def sampled_by(executor: Executor) -> list[list[int]]:
    found = []
    for plan, _ in scheduled_steps():
        sampled = executor.step(plan, constrain(plan))
        sampled.wait()
        result = sampled.result(0, 0)
        reported = b"".join(row.logprobs.token_ids for row in result.logprobs)
        found.append(unpack(result.token_ids + reported).tolist())
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
    if size == 2:
        both = run_steps(root, tp, replayed=True), run_steps(root, tp, replayed=False)
        torch.save(both, steps_file(root, size, rank))
    if size == 2 and rank == 0:
        outlive_the_others(tp)
    tp.close()
