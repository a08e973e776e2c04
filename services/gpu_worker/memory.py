"""How many KV blocks there are, and whether they are enough. No torch."""

from __future__ import annotations

import os

from nanovllm.settings import Settings, SettingsError
from nanovllm.wording import counted

# On a CPU all ranks' caches together take this share of the memory, and no more than the limit.
CPU_SHARE = 1 / 8
CPU_LIMIT = 2 << 30


def blocks_per_sequence(settings: Settings) -> int:
    """How many blocks the longest sequence takes: the columns of a block table."""
    return -(-settings.max_model_len // settings.kvcache_block_size)


def cpu_blocks(settings: Settings, block_bytes: int) -> int:
    """How many blocks a rank has on a CPU: no more than all slots can use.

    Args:
        block_bytes: bytes of a block on this rank.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    budget = min(int(memory * CPU_SHARE), CPU_LIMIT) // settings.tensor_parallel_size
    useful = settings.max_num_seqs * blocks_per_sequence(settings)
    return min(budget // block_bytes, useful)


def cuda_blocks(settings: Settings, block_bytes: int, total: int, used: int, peak: int) -> int:
    """How many blocks a rank has on its GPU.

    Args:
        block_bytes: bytes of a block on this rank.
        total: bytes of the GPU's memory.
        used: bytes in use now, by any process.
        peak: bytes that the largest step takes in addition, while it runs.
    """
    budget = int(total * settings.gpu_memory_utilization) - used - peak
    return max(0, budget // block_bytes)


def check_room_for_one(
    num_blocks: int, settings: Settings, block_bytes: int = 0, remedy: str = ""
) -> None:
    """Raises SettingsError unless the longest sequence fits into `num_blocks` blocks.

    Args:
        block_bytes: bytes of a block on a rank; 0 if blocks take no memory.
        remedy: how to get more memory, said if `num_kvcache_blocks` is not given.
    """
    needed = blocks_per_sequence(settings)
    if num_blocks >= needed:
        return
    size = settings.kvcache_block_size
    missing = f"{counted(needed, 'block')} of {size} tokens"
    missing += f" for --max-model-len {settings.max_model_len}"
    if block_bytes:
        short = (needed - num_blocks) * block_bytes / 2**20
        missing += f" ({short:.0f} MiB more)"
    if settings.num_kvcache_blocks >= 0:
        remedy = "raise --num-kvcache-blocks"
    shorter = f"lower --max-model-len to {num_blocks * size}" if num_blocks else ""
    raise SettingsError(
        f"not enough memory for one sequence: there is room for {counted(num_blocks, 'block')},"
        f" and it takes {missing};"
        f" {' or '.join(option for option in (shorter, remedy) if option)}"
    )
