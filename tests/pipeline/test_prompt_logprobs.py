"""Log-probabilities of prompts: transformers' own, once, however the prompt was computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.support.pipeline import Pipeline
from nanovllm import LLM, Client, SamplingParams
from nanovllm.checkpoint import DEMO_CHECKPOINT
from nanovllm.protocol import PromptLogprobs
from tests.checkpoints import read_model
from tests.pipeline.wire import Wire

COUNT = 3
PROMPTS = [
    [300 + 7 * (i * i + number) % 500 for i in range(40 + 9 * number)] for number in range(4)
]
# Chunks of a prompt in several steps; two ranks, and so few blocks that sequences are preempted.
CHUNKS = (
    "--dtype float32 --tp 2 --kvcache-block-size 16 --num-kvcache-blocks 10 --max-model-len 128"
    " --max-num-batched-tokens 24 --max-num-seqs 8"
)


def ask(prompt: list[int], **keys: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "prompt_logprobs": COUNT}
    return {"prompt_token_ids": prompt, "sampling": sampling, **keys}


def check(found: PromptLogprobs | None, prompt: list[int], model: Any) -> None:
    assert found is not None
    assert len(found) == len(prompt)
    assert found[0] is None
    with torch.inference_mode():
        rows = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    for entry, token, row in zip(found[1:], prompt[1:], rows, strict=False):
        assert entry is not None
        assert [entry[0][0], len(entry)] == [token, 1 + COUNT]
        for token_id, value in entry:
            assert value == pytest.approx(float(row[token_id]), abs=1e-4)
        likeliest = row.topk(COUNT).values.tolist()
        assert [value for _, value in entry[1:]] == pytest.approx(likeliest, abs=1e-4)


@pytest.mark.parametrize("arguments", ["", CHUNKS])
def test_prompt_logprobs_equal_transformers(
    pipeline: Pipeline, start_pipeline: Callable[..., Pipeline], arguments: str
) -> None:
    """The second time the prompts' blocks are in the prefix cache."""
    running = start_pipeline(DEMO_CHECKPOINT, *arguments.split()) if arguments else pipeline
    model = read_model(DEMO_CHECKPOINT)
    with Wire(running.endpoint) as wire:
        for _ in range(2):
            asked = [ask(prompt, stream=stream) for prompt in PROMPTS for stream in (True, False)]
            answers = wire.run(*asked)
            for answer, request in zip(answers, asked, strict=True):
                check(answer.prompt_logprobs, request["prompt_token_ids"], model)
                assert len(answer.token_ids) == 12
                assert answer.finish.usage.cached_tokens == 0


def test_a_resumed_request_gets_no_prompt_logprobs_again(wire: Wire) -> None:
    (whole,) = wire.run(ask(PROMPTS[0]))
    (resumed,) = wire.run(ask(PROMPTS[0], resume_token_ids=whole.token_ids[:5]))
    assert resumed.prompt_logprobs is None
    assert resumed.token_ids == whole.token_ids[5:]


def test_the_clients_give_them(pipeline: Pipeline, wire: Wire) -> None:
    (expected,) = wire.run(ask(PROMPTS[1]))
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=COUNT)
    with LLM(endpoint=pipeline.endpoint) as llm:
        (output,) = llm.generate([PROMPTS[1]], params, use_tqdm=False)
    with Client(pipeline.endpoint) as client:
        stream = client.generate(PROMPTS[1], params, stream=True)
        first = next(stream)
        assert stream.result().prompt_logprobs == first.prompt_logprobs
    assert output["prompt_logprobs"] == first.prompt_logprobs == expected.prompt_logprobs


def test_a_prompt_of_one_token_has_none(wire: Wire) -> None:
    (answer,) = wire.run(ask([300]))
    assert answer.prompt_logprobs == [None]
