"""Greedy output through the ingress equals transformers' own models', token for token, in float32.

Random checkpoints of several shapes, served by real pipelines: prompts of 1 to several hundred
tokens, alone and 32 at once, with tensor parallelism, two block sizes, prefix-cache hits, chunked
prefill under a small budget, and preemption.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.support.pipeline import Pipeline
from nanovllm import LLM, SamplingParams
from nanovllm.checkpoint import DEMO_CHECKPOINT
from nanovllm.control import SchedulerStats
from tests.checkpoints import read_model, write_checkpoint

# Where transformers' two likeliest logits are nearer than this, either is right.
TIE = 1e-4
NEW_TOKENS = 24


class Case(NamedTuple):
    name: str
    shape: dict[str, Any]
    shards: int
    arguments: str
    preempts: bool = False


SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "max_position_embeddings": 1024,
}
CASES = [
    Case(
        "tied, 4 query heads a KV head, blocks of 16",
        {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 24}
        | {"tie_word_embeddings": True, "vocab_size": 2048},
        1,
        "--kvcache-block-size 16",
    ),
    Case(
        "one KV head on 4 ranks, a vocabulary that they do not divide",
        {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 32}
        | {"tie_word_embeddings": False, "vocab_size": 2051},
        3,
        "--tp 4 --kvcache-block-size 16",
    ),
    Case(
        "Qwen2, tp 2, several KV heads a rank, blocks of 256",
        {"family": "qwen2", "num_attention_heads": 8, "num_key_value_heads": 4}
        | {"tie_word_embeddings": False, "vocab_size": 2048},
        3,
        "--tp 2 --kvcache-block-size 256",
    ),
    Case(
        "Qwen2, small budget, few blocks",
        {"family": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2}
        | {"tie_word_embeddings": True, "vocab_size": 2048},
        1,
        "--kvcache-block-size 16 --num-kvcache-blocks 48 --max-model-len 640 --max-num-seqs 32"
        " --max-num-batched-tokens 80 --max-prefill-tokens 48",
        preempts=True,
    ),
]


def prompts_for(vocabulary: int, block_size: int) -> list[list[int]]:
    """32 prompts: ragged lengths, some whole numbers of blocks, several with common beginnings."""
    draw = random.Random(7)
    lengths = [1, 2, 15, 16, 17, 32, 33, 64, 100, 255, 256, 257, 300, 400, 512]
    prompts = [[draw.randrange(vocabulary) for _ in range(length)] for length in lengths]
    shared = [draw.randrange(vocabulary) for _ in range(4 * min(block_size, 64))]
    while len(prompts) < 32:
        tail = [draw.randrange(vocabulary) for _ in range(draw.choice([0, 0, 1, 7, 16, 40]))]
        prompts.append(shared + tail)
    return prompts


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_greedy_output_equals_transformers(
    case: Case, tmp_path: Path, start_pipeline: Callable[..., Pipeline]
) -> None:
    checkpoint = tmp_path / "checkpoint"
    write_checkpoint(
        checkpoint, shards=case.shards, tokenizer=DEMO_CHECKPOINT, **SMALL, **case.shape
    )
    arguments = case.arguments.split()
    pipeline = start_pipeline(checkpoint, "--dtype", "float32", *arguments)
    block_size = int(arguments[arguments.index("--kvcache-block-size") + 1])
    prompts = prompts_for(case.shape["vocab_size"], block_size)
    model = read_model(checkpoint)
    greedy = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with LLM(endpoint=pipeline.endpoint) as llm:
        together = llm.generate(prompts, greedy, use_tqdm=False)
        again = llm.generate(prompts, greedy, use_tqdm=False)
        alone = [llm.generate([p], greedy, use_tqdm=False)[0] for p in prompts[::6]]
    checked: set[tuple[int, ...]] = set()
    for outputs, subset in ((together, 1), (again, 1), (alone, 6)):
        for prompt, output in zip(prompts[::subset], outputs, strict=True):
            sequence = (*prompt, *output["token_ids"])
            assert len(sequence) == len(prompt) + NEW_TOKENS
            if sequence not in checked:
                check(model, sequence, len(prompt))
            checked.add(sequence)
    idle = pipeline.stats_once(SchedulerStats, lambda stats: stats.records == 0)
    assert idle.cached_tokens > 0, "the second time, prompts are in the prefix cache"
    assert idle.blocks_used == 0
    if case.preempts:
        assert idle.preemptions > 0


def check(model: Any, sequence: Sequence[int], prompt_length: int) -> None:
    """Each output token is transformers' likeliest after those before it, or as good as that."""
    with torch.inference_mode():
        logits = model(torch.tensor([sequence])).logits[0, prompt_length - 1 : -1]
    tokens = torch.tensor(sequence[prompt_length:])
    less = logits.amax(dim=1) - logits.gather(1, tokens[:, None])[:, 0]
    differ = (less >= TIE).nonzero().flatten().tolist()
    assert not differ, f"tokens {differ} of {prompt_length}-token prompt differ"
