"""Weights with NaN and infinity: a request whose logits they reach ends with an error, and other
requests go on as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.support.pipeline import Pipeline
from nanovllm.checkpoint import DEMO_CHECKPOINT
from tests.checkpoints import write_checkpoint
from tests.pipeline.wire import Wire

BAD = {2000: torch.nan, 2001: torch.inf}
TOKENS = 24


@pytest.mark.parametrize("arguments", ["", "--tp 2 --attention sdpa --pipeline-depth 1"])
def test_weights_that_are_not_finite_end_the_requests_they_reach(
    tmp_path: Path, start_pipeline: Callable[..., Pipeline], arguments: str
) -> None:
    write_checkpoint(
        tmp_path, tokenizer=DEMO_CHECKPOINT, vocab_size=2048, tie_word_embeddings=False
    )
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for token, value in BAD.items():
        tensors["model.embed_tokens.weight"][token] = value
    save_file(tensors, file, metadata={"format": "pt"})
    # Few small blocks, so that good requests get blocks that bad ones had.
    pipeline = start_pipeline(
        tmp_path, "--kvcache-block-size", "16", "--num-kvcache-blocks", "40",
        "--max-model-len", "128", *arguments.split(),
    )  # fmt: skip

    def ask(prompt: list[int], **sampling: Any) -> dict[str, Any]:
        sampling = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0, **sampling}
        return {"prompt_token_ids": prompt, "sampling": sampling}

    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 1.0, "seed": 2, "top_k": 20},
        {"temperature": 1.0, "seed": 3, "top_p": 0.9, "logprobs": 2},
        {"temperature": 1.0, "seed": 4, "top_k": 100, "min_p": 0.1},
    ]
    prompts = [[10 + i] * (5 + 11 * i) for i in range(4)]
    with Wire(pipeline.endpoint) as wire:
        good = [ask(prompt, **kind) for prompt in prompts for kind in kinds]
        alone = wire.run(*good)
        for token in BAD:
            bad = [ask([*prompt, token], **kind) for prompt in prompts for kind in kinds]
            bad += [ask([token, *prompt]) for prompt in prompts]
            beside = wire.ask_all(
                [one for pair in zip(good, bad[-len(good) :], strict=True) for one in pair]
            )
            wire.results(*beside)
            for answer, expected in zip(beside[::2], alone, strict=True):
                assert answer.token_ids == expected.token_ids
                assert answer.finish.finish_reason == "length"
            for answer in beside[1::2]:
                assert answer.error.code == "internal"
                assert "not finite" in answer.error.message
                assert not answer.token_ids
    assert pipeline.transcript.count("logits are not finite") == 1
    assert "restart" not in pipeline.transcript
