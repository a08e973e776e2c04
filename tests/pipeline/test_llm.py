"""nano-vLLM's interface on a pipeline of its own, at tp 2: the same output as at tp 1 on the wire.

That it ends with its program however that ends is shown in tests/client/test_private_pipeline.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer

from benchmarks.support.pipeline import Pipeline
from nanovllm import LLM, SamplingParams
from nanovllm.checkpoint import DEMO_CHECKPOINT
from tests.pipeline.wire import Wire

tokenizer = Tokenizer.from_file(str(DEMO_CHECKPOINT / "tokenizer.json"))
TEXTS = ["Once upon a time", "A fox", "Grüße 日本語 😀", "The lighthouse"]
PROMPTS: list[str | list[int]] = [*TEXTS, *(tokenizer.encode(text).ids for text in TEXTS)]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(
        str(DEMO_CHECKPOINT),
        enforce_eager=True,
        tensor_parallel_size=2,
        max_model_len=1024,
        device="cpu",
    ) as running:
        yield running


def on_the_wire(pipeline: Pipeline, params: list[SamplingParams]) -> list[tuple[str, list[int]]]:
    """What the shared pipeline, at tp 1, makes of PROMPTS."""
    with Wire(pipeline.endpoint) as wire:
        answers = wire.ask_all(
            {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt}
            | {"sampling": keys(sampling), "stream": False}
            for prompt, sampling in zip(PROMPTS, params, strict=True)
        )
        wire.results(*answers)
    return [(answer.text, answer.token_ids) for answer in answers]


def keys(params: SamplingParams) -> dict[str, Any]:
    return {
        name: getattr(params, name)
        for name in ("temperature", "max_tokens", "ignore_eos", "top_p", "top_k", "seed")
    }


@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (0.6, 0), (0.6, 20), (1.5, 0)])
def test_each_prompt_with_its_own_parameters(
    llm: LLM, pipeline: Pipeline, temperature: float, top_k: int
) -> None:
    """Lengths differ, so that they end in another order than they came in."""
    params = [
        SamplingParams(
            temperature, 40 - 4 * number, ignore_eos=True, top_p=0.95, top_k=top_k, seed=number
        )
        for number in range(len(PROMPTS))
    ]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [(o["text"], o["token_ids"]) for o in outputs] == on_the_wire(pipeline, params)
    assert [len(output["token_ids"]) for output in outputs] == [p.max_tokens for p in params]
    for output in outputs:
        assert output["finish_reason"] == "length"
        assert output["usage"]["completion_tokens"] == len(output["token_ids"])
        assert output["text"] == tokenizer.decode(output["token_ids"])


def test_one_set_of_parameters_for_all(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = llm.generate(PROMPTS, SamplingParams(0.6, 32))
    assert "8/8" in capsys.readouterr().err, "the progress bar"
    assert len(outputs) == len(PROMPTS)
    assert all(1 <= len(output["token_ids"]) <= 32 for output in outputs)
    again = llm.generate(TEXTS[:1] * 3, SamplingParams(1.5, 32), use_tqdm=False)
    assert len({output["text"] for output in again}) == 3, "without a seed each is drawn anew"
    greedy = llm.generate(
        [TEXTS[0], PROMPTS[4]], SamplingParams(temperature=0.0, max_tokens=9), False
    )
    same = "a text and its token ids are the same prompt"
    assert greedy[0]["token_ids"] == greedy[1]["token_ids"], same
    assert capsys.readouterr().err == ""
