"""From settings to a loaded executor: device, process group, weights, KV cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanovllm.checkpoint import CheckpointError, ModelConfig
from nanovllm.control import LoadingStage
from nanovllm.kernels.attention.choose import choose
from nanovllm.kernels.attention.interface import AttentionShape, LayerCache
from nanovllm.kernels.layers.ops import has_fp8
from nanovllm.messages import Admission, StepPlan, pack
from nanovllm.services.gpu_worker import memory
from nanovllm.services.gpu_worker.executor import Executor
from nanovllm.services.gpu_worker.graphs import CudaCapture, Sizes, graph_sizes
from nanovllm.services.gpu_worker.model.loader import as_stored, load_checkpoint
from nanovllm.services.gpu_worker.model.parallel import TensorParallel, local_heads
from nanovllm.services.gpu_worker.model.registry import Model, build_model
from nanovllm.services.gpu_worker.runner import Loaded
from nanovllm.services.gpu_worker.slot_state import COSTLIEST
from nanovllm.settings import Settings, SettingsError
from nanovllm.wording import counted

# How many bytes of weights make one more CPU thread worthwhile. Threads wait for one another at
# every operation. With fewer weights one more thread gains nothing, and costs much if another
# service takes the core of one of the threads.
BYTES_PER_THREAD = 1 << 24


def choose_device(settings: Settings, rank: int) -> torch.device:
    """This rank's device, which becomes the calling thread's current one. On a CPU the thread gets
    this rank's share of the cores.

    Raises:
        SettingsError: if there is no device for this rank.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    size = settings.tensor_parallel_size
    if settings.device == "cpu" or (settings.device == "auto" and not found):
        torch.set_num_threads(max(1, torch.get_num_threads() // (size * settings.engines)))
        return torch.device("cpu")
    if not found:
        raise SettingsError("--device cuda: torch finds no GPU here; --device cpu needs none")
    if found < size:
        raise SettingsError(f"--tp {size} takes as many GPUs, and torch finds {found}")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return device


def choose_dtype(settings: Settings, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype of weights and cache. Raises CheckpointError if the checkpoint's is not served."""
    name = settings.dtype
    if name == "auto" and device.type == "cpu":
        return torch.float32
    try:
        return _DTYPES[(config.dtype or "float32") if name == "auto" else name]
    except KeyError:
        raise CheckpointError(f"dtype {config.dtype!r} is not served; give a --dtype") from None


_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@torch.inference_mode()
def load(
    directory: Path,
    config: ModelConfig,
    settings: Settings,
    device: torch.device,
    tp: TensorParallel,
    progress: Callable[[LoadingStage, int, int], None],
) -> tuple[Executor, Loaded]:
    """Loads the model, and allocates a KV cache of the same number of blocks on every rank.

    Args:
        progress: takes a stage, how much of the stage is done, and how much there is in total.

    Raises:
        CheckpointError: see `load_checkpoint`.
        SettingsError: if there is not enough memory.
    """
    config = as_stored(config, directory)
    dtype = choose_dtype(settings, config, device)
    tp = tp.with_peers(config.hidden_size, dtype, device)
    shape = attention_shape(config, tp, settings.kvcache_block_size)
    try:
        backend, attention, capturable = choose(settings.attention, shape, dtype, device)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    size = block_bytes(config, shape, dtype)
    graphs = capturable and not settings.enforce_eager

    def executor(num_blocks: int) -> Executor:
        kv_cache = allocate_kv_cache(config, shape, num_blocks, dtype, device)
        return Executor(model, backend, kv_cache, settings, device)

    try:
        model = build_model(config, settings.max_model_len, tp, dtype, device)
        load_checkpoint(model, directory, partial(progress, "loading weights"))
        if device.type == "cpu":
            _use_worthwhile_threads(model)
        if settings.num_kvcache_blocks >= 0:
            num_blocks = settings.num_kvcache_blocks
        elif device.type == "cuda":
            measuring = partial(progress, "measuring memory")
            num_blocks = _blocks_on_cuda(executor, settings, device, size, graphs, measuring)
        else:
            num_blocks = memory.cpu_blocks(settings, size)
        # A collective: a rank may give up only after it.
        num_blocks = tp.minimum(num_blocks, device)
        remedy = (
            "raise --gpu-memory-utilization or --tp"
            if device.type == "cuda"
            else "give --num-kvcache-blocks"
        )
        memory.check_room_for_one(num_blocks, settings, size, remedy)
        loaded = executor(num_blocks)
        if graphs:
            capturing = partial(progress, "capturing graphs")
            loaded.capture_graphs(_sizes(settings), CudaCapture(device), capturing)
        tp.begin_steps(device)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(
            f"not enough memory on {device} for the model and its cache: {reason}; raise --tp, or"
            " lower --max-num-batched-tokens or --num-kvcache-blocks"
        ) from None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    weights = str(dtype).removeprefix("torch.")
    if config.fp8:
        weights += f", projections {'in' if has_fp8(device) else 'rounded to'} FP8"
    described = f"{name}, {weights}, {attention} attention"
    blocks = f"{counted(num_blocks, 'block')} of {settings.kvcache_block_size} tokens"
    processors = f"{loaded.processors.bytes >> 20} MiB for logits processors"
    return loaded, Loaded(num_blocks, f"{described}, {blocks}, {processors}")


def attention_shape(config: ModelConfig, tp: TensorParallel, block_size: int) -> AttentionShape:
    """The shape of this rank's attention."""
    heads = local_heads(config, tp)
    return AttentionShape(heads.num, heads.num_kv, config.head_dim, block_size)


def block_bytes(config: ModelConfig, shape: AttentionShape, dtype: torch.dtype) -> int:
    """Bytes of one block on this rank: keys and values of all layers."""
    per_token = 2 * config.num_hidden_layers * shape.num_kv_heads * shape.head_dim
    return per_token * shape.block_size * dtype.itemsize


def allocate_kv_cache(
    config: ModelConfig,
    shape: AttentionShape,
    num_blocks: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[LayerCache]:
    """Zeros for every layer: `num_blocks` blocks and a spare block, which no sequence gets. See
    `kernels.attention.interface` for the layout."""
    size = (num_blocks + 1, shape.block_size, shape.num_kv_heads, shape.head_dim)
    return [
        LayerCache(k=_zeros(size, dtype, device), v=_zeros(size, dtype, device))
        for _ in range(config.num_hidden_layers)
    ]


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    # The system gives NumPy zeros that take memory only where they are written.
    untouched = np.zeros(math.prod(size) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(untouched).view(dtype).view(size)


def _use_worthwhile_threads(model: Model) -> None:
    """Lets torch use no more threads than are worthwhile for this rank's shard."""
    weights = sum(tensor.target.nbytes for tensor in model.checkpoint_tensors())
    torch.set_num_threads(min(torch.get_num_threads(), 1 + weights // BYTES_PER_THREAD))


def _blocks_on_cuda(
    make_executor: Callable[[int], Executor],
    settings: Settings,
    device: torch.device,
    size: int,
    graphs: bool,
    progress: Callable[[int, int], None],
) -> int:
    """How many blocks fit beside the graphs and the largest steps, some of which are run to measure
    their memory."""
    steps = largest_steps(settings)
    captured = _largest(_sizes(settings)).total if graphs else 0
    tried = captured + len(steps)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    executor = make_executor(0)
    held = 0
    if graphs:
        held = _bytes_of_graphs(executor, settings, device, lambda done, _: progress(done, tried))
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    for number, plan in enumerate(steps):
        progress(captured + number, tried)
        executor.step(plan).wait()
        executor.reset()
    progress(tried, tried)
    peak = torch.cuda.max_memory_allocated(device) - before
    del executor
    torch.cuda.empty_cache()
    return memory.cuda_blocks(settings, size, total, total - free + held, peak)


def _bytes_of_graphs(
    executor: Executor,
    settings: Settings,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> int:
    """Bytes that all graphs together will hold, estimated from some that are captured. The largest
    is captured first, with the temporaries that all graphs share; the last one captured holds as
    much as each graph not captured."""
    sizes = _sizes(settings)
    free = [torch.cuda.mem_get_info(device)[0]]

    def look(done: int, total: int) -> None:
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info(device)[0])
        progress(done, total)

    some = _largest(sizes)
    executor.capture_graphs(some, CudaCapture(device), look)
    torch.cuda.empty_cache()
    draws = free[-1] - torch.cuda.mem_get_info(device)[0]
    return draws + free[0] - free[-2] + (sizes.total - some.total + 1) * (free[-2] - free[-1])


def _largest(sizes: Sizes) -> Sizes:
    return sizes._replace(decodes=sizes.decodes[-1:], mixed=sizes.mixed[-1:])


def _sizes(settings: Settings) -> Sizes:
    return graph_sizes(settings.max_num_seqs, settings.max_prefill_tokens)


def largest_steps(settings: Settings) -> list[StepPlan]:
    """Two steps of a whole token budget: one with as many sequences as there may be, one with
    sequences as long as they may be. All sample in the costliest way, and all blocks are block 0.
    """
    budget, longest = settings.max_num_batched_tokens, settings.max_model_len - 1
    return [
        _prefill(settings, number, length, count)
        for number, length, count in (
            (0, min(longest, budget // settings.max_num_seqs), settings.max_num_seqs),
            (1, min(longest, budget), min(settings.max_num_seqs, max(1, budget // longest))),
        )
    ]


def _prefill(settings: Settings, number: int, length: int, count: int) -> StepPlan:
    """A step that computes `count` prompts of `length` tokens."""
    blocks = -(-length // settings.kvcache_block_size)
    tokens = np.zeros(length, dtype=np.int32)
    return StepPlan(
        number=number,
        release=b"",
        admit=[
            Admission(slot, pack(tokens), length, pack([0] * blocks), 0, COSTLIEST)
            for slot in range(count)
        ],
        append=b"",
        prefill=pack(value for slot in range(count) for value in (slot, 0, length)),
        decode=b"",
    )
