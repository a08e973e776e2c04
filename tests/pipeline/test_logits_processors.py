"""Penalties, bias and tokens ruled out, through the whole pipeline, against transformers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.support.pipeline import Pipeline
from nanovllm.checkpoint import DEMO_CHECKPOINT, ModelConfig
from nanovllm.protocol import Sampling
from tests.checkpoints import read_model
from tests.gpu_worker.test_logits import expected
from tests.pipeline.wire import Wire

MODEL = ModelConfig.from_checkpoint(DEMO_CHECKPOINT)
EOS = list(MODEL.eos_token_ids or ())
PROMPT = [300, 301, 302, 310, 300]
TOKENS = 24
CASES: list[dict[str, Any]] = [
    {"repetition_penalty": 3.0},
    {"frequency_penalty": 2.0, "presence_penalty": 2.0},
    {"presence_penalty": -2.0, "repetition_penalty": 0.4, "frequency_penalty": -2.0},
    {"logit_bias": {400: 8.5, 401: 8.0, 5: -100.0}},
    {"allowed_token_ids": list(range(350, 420)), "frequency_penalty": 0.7},
    {"repetition_penalty": 2.0, "presence_penalty": 1.5, "bad_words": [[462], [266, 516]]},
    {},
]
RANDOM = 6
# Two ranks, and so few blocks that sequences are preempted.
FEW_BLOCKS = (
    "--dtype float32 --tp 2 --kvcache-block-size 16 --num-kvcache-blocks 9 --max-model-len 64"
)


def random_case(draw: random.Random) -> dict[str, Any]:
    """Any parameters together, with the ends of their ranges and of the vocabulary."""

    def tokens(count: int) -> list[int]:
        last = MODEL.vocab_size - 1
        return [draw.choice([*EOS, 0, last, *draw.choices(range(last), k=8)]) for _ in range(count)]

    bias = {token: draw.choice([-100.0, 5.0, 100.0]) for token in tokens(draw.choice([1, 300]))}
    words = [tokens(draw.choice([1, 2, 16])) for _ in range(draw.choice([1, 64]))]
    case = {
        "repetition_penalty": draw.choice([0.01, 0.5, 1.3, 10.0]),
        "frequency_penalty": draw.choice([-2.0, -0.0, 1e-300, 2.0]),
        "presence_penalty": draw.choice([-2.0, 5e-324, 0.6, 2.0]),
        "logit_bias": bias,
        "bad_words": words,
        "allowed_token_ids": tokens(200),
    }
    return {key: value for key, value in case.items() if draw.random() < 0.5}


def greedy(model: Any, sampling: Sampling) -> list[int]:
    """What transformers' processors leave the likeliest, token by token."""
    output: list[int] = []
    for _ in range(TOKENS):
        with torch.inference_mode():
            logits = model(torch.tensor([PROMPT + output])).logits[0, -1].float()
        output.append(int(expected(logits, sampling, PROMPT, output).argmax()))
    return output


@pytest.mark.parametrize("arguments", ["", FEW_BLOCKS])
def test_greedy_outputs_are_those_of_transformers(
    pipeline: Pipeline, start_pipeline: Callable[..., Pipeline], arguments: str
) -> None:
    running = start_pipeline(DEMO_CHECKPOINT, *arguments.split()) if arguments else pipeline
    model = read_model(DEMO_CHECKPOINT)
    cases = [*CASES, *(random_case(random.Random(seed)) for seed in range(RANDOM))]
    outputs = [greedy(model, Sampling(**case)) for case in cases]
    assert len({tuple(o) for o in outputs[: len(CASES)]}) == len(CASES), "each does something"

    def ask(case: dict[str, Any], **keys: Any) -> dict[str, Any]:
        sampling = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, **case}
        return {"prompt_token_ids": PROMPT, "sampling": sampling, **keys}

    with Wire(running.endpoint) as wire:
        together = wire.run(*(ask(case) for case in cases), *(ask(case) for case in cases))
        resumed = wire.run(
            *(
                ask(case, resume_token_ids=output[: 3 * i % TOKENS])
                for i, (case, output) in enumerate(zip(cases, outputs, strict=True))
            )
        )
    assert [answer.token_ids for answer in together] == outputs * 2
    for i, (answer, output) in enumerate(zip(resumed, outputs, strict=True)):
        assert answer.token_ids == output[3 * i % TOKENS :]


def test_logprobs_are_of_the_raw_logits(wire: Wire) -> None:
    plain, biased = wire.run(
        *(
            {
                "prompt_token_ids": PROMPT,
                "sampling": {"temperature": 0, "max_tokens": 1, "logprobs": 3, "logit_bias": bias},
            }
            for bias in ({}, {400: 100.0})
        )
    )
    assert biased.token_ids == [400]
    assert biased.logprobs[0][1:] == plain.logprobs[0][1:]
    assert biased.logprobs[0][0][1] < plain.logprobs[0][0][1]


def test_min_tokens_hold_off_every_end(wire: Wire) -> None:
    story: dict[str, Any] = {"prompt": "Once upon a time"}
    free: dict[str, Any] = {"temperature": 0, "max_tokens": 300}
    (ended,) = wire.run({**story, "sampling": free})
    count = len(ended.token_ids)
    assert ended.token_ids[-1] in EOS
    stop_id = ended.token_ids[4]
    stop = ended.text[:5]
    more = {**free, "min_tokens": count + 5}
    by_id_or_string = {**free, "min_tokens": 9, "stop_token_ids": [stop_id], "stop": [stop]}
    longer, by_id, by_string, after, resumed = wire.run(
        {**story, "sampling": more},
        {**story, "sampling": {**free, "min_tokens": 9, "stop_token_ids": [stop_id]}},
        {**story, "sampling": {**free, "min_tokens": 9, "stop": [stop]}},
        {**story, "sampling": {**more, "max_tokens": count + 5}},
        {**story, "sampling": by_id_or_string, "resume_token_ids": ended.token_ids[:6]},
    )
    assert not set(EOS) & set(longer.token_ids[: count + 5])
    assert longer.token_ids[: count - 1] == ended.token_ids[:-1]
    assert len(by_id.token_ids) > 9
    assert stop_id not in by_id.token_ids[:9]
    assert by_string.text.startswith(stop)
    assert after.finish.finish_reason == "length"
    assert resumed.finish.usage.completion_tokens > 9


def test_bad_words_do_not_come(wire: Wire) -> None:
    request: dict[str, Any] = {"prompt": "Once upon a time", "sampling": {"temperature": 0}}
    (free,) = wire.run(request)
    word = max(free.text.split(), key=len).strip(".,!\"'")
    (without,) = wire.run({**request, "sampling": {"temperature": 0, "bad_words": [word]}})
    assert word in free.text
    assert word not in without.text


def test_a_row_without_any_token_left_ends_with_an_error(wire: Wire) -> None:
    sampling = {"allowed_token_ids": [350, 351], "bad_words": [[350], [351]], "temperature": 0}
    bad, stream, good = wire.run(
        {"prompt_token_ids": PROMPT, "sampling": sampling, "stream": False},
        {"prompt_token_ids": PROMPT, "sampling": {**sampling, "bad_words": [[350], [351, 351]]}},
        {"prompt_token_ids": PROMPT, "sampling": {"temperature": 0, "max_tokens": 5}},
    )
    for answer, tokens in ((bad, 0), (stream, 1)):
        assert answer.error.code == "invalid_request"
        assert f"after {tokens} output tokens" in answer.error.message
    assert good.finish.finish_reason == "length"


def test_the_request_says_what_its_text_holds(wire: Wire) -> None:
    request: dict[str, Any] = {"prompt": "Once upon a time"}
    sampling: dict[str, Any] = {"temperature": 0, "max_tokens": 300}
    (story,) = wire.run({**request, "sampling": sampling})
    stop = story.text[6:12]
    included, special = wire.run(
        {
            **request,
            "sampling": {**sampling, "stop": [stop], "include_stop_str_in_output": True},
        },
        {**request, "sampling": {**sampling, "skip_special_tokens": False}},
    )
    assert included.text == story.text[: story.text.index(stop) + len(stop)]
    assert special.text == story.text + "<|endoftext|>"


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "sampling.min_tokens"),
        ({"bad_words": ["x" * 400]}, "sampling.bad_words"),
        ({"bad_words": [f"word{i}" for i in range(60)]}, "sampling.bad_words"),
        ({"logit_bias": {10**6: 1.0}}, "sampling.logit_bias"),
        ({"allowed_token_ids": [10**6]}, "sampling.allowed_token_ids"),
        ({"bad_words": [[1, 10**6]]}, "sampling.bad_words"),
    ],
)
def test_a_wrong_parameter_is_named(wire: Wire, sampling: dict[str, Any], named: str) -> None:
    (answer,) = wire.run({"prompt": "x", "sampling": sampling})
    assert answer.error.code == "invalid_request"
    assert answer.error.message.startswith(named)
