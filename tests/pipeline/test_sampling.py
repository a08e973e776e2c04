"""How tokens are drawn, and what ends an output: the demo checkpoint in float32, on the wire."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanovllm.checkpoint import DEMO_CHECKPOINT, ModelConfig
from nanovllm.protocol import Logprobs
from tests.checkpoints import read_model
from tests.pipeline.wire import Wire

STORY = "Once upon a time"
MIXES: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 20},
    {"temperature": 2.0, "min_p": 0.05},
    {"temperature": 1.2, "top_p": 0.8, "top_k": 50, "min_p": 0.01},
    {"temperature": 10.0, "logprobs": 2},
]
PROMPTS = [STORY, "A fox", "The old lighthouse stood", "Grüße aus Köln: 日本語 😀, and"]
REQUESTS: list[dict[str, Any]] = [
    {
        "prompt": prompt,
        "sampling": {**mix, "seed": 31 * row + column, "max_tokens": 24, "ignore_eos": True},
    }
    for row, mix in enumerate(MIXES)
    for column, prompt in enumerate(PROMPTS)
]


@pytest.fixture(scope="module")
def model() -> Any:
    """The demo checkpoint in transformers."""
    return read_model(DEMO_CHECKPOINT)


def greedy(prompt: str = STORY, **sampling: Any) -> dict[str, Any]:
    return {"prompt": prompt, "sampling": {"temperature": 0.0, **sampling}}


def test_seeded_tokens_are_the_same_alone_and_24_at_once(wire: Wire) -> None:
    together = wire.run(*REQUESTS)
    alone = [wire.run(request)[0] for request in REQUESTS]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert [a.text for a in together] == [a.text for a in alone]
    outputs = {tuple(answer.token_ids) for answer in together}
    assert len(outputs) == len(REQUESTS), "seeds, prompts and parameters matter"


@pytest.mark.parametrize("stream", [True, False])
def test_seeded_tokens_are_the_same_resumed_from_any_point(wire: Wire, stream: bool) -> None:
    for request in (REQUESTS[3], REQUESTS[18], REQUESTS[20]):
        (whole,) = wire.run(request)
        tokens = whole.token_ids
        points = range(len(tokens) + 1)
        resumed = wire.run(
            *({**request, "resume_token_ids": tokens[:k], "stream": stream} for k in points)
        )
        for k, answer in zip(points, resumed, strict=True):
            assert answer.token_ids == tokens[k:]
            assert whole.text.endswith(answer.text)
            assert near(answer.logprobs, whole.logprobs[k:])
            assert answer.finish.finish_reason == "length"
            assert answer.finish.usage.completion_tokens == len(tokens)


def test_the_seed_that_was_drawn_repeats_the_output(wire: Wire) -> None:
    free: dict[str, Any] = {"prompt": STORY, "sampling": {"temperature": 1.5, "max_tokens": 20}}
    drawn = wire.run(free, free, {**free, "stream": False})
    assert len({answer.seed for answer in drawn}) == 3
    assert len({tuple(answer.token_ids) for answer in drawn}) == 3
    again = wire.run(*({**free, "sampling": {**free["sampling"], "seed": a.seed}} for a in drawn))
    assert [a.token_ids for a in again] == [a.token_ids for a in drawn]
    assert [a.seed for a in again] == [a.seed for a in drawn]


def test_requests_of_one_prompt_compute_its_full_blocks_once(wire: Wire) -> None:
    """However they fall into steps: the first to be computed is ahead of all others."""
    prompt = [300 + (7 * i) % 400 for i in range(600)]

    def ask(salt: str) -> dict[str, Any]:
        sampling = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
        return {"prompt_token_ids": prompt, "cache_salt": salt, "sampling": sampling}

    (alone,) = wire.run(ask("alone"))
    together = wire.run(*[ask("together")] * 6)
    assert {tuple(answer.token_ids) for answer in together} == {tuple(alone.token_ids)}
    cached = sorted(answer.finish.usage.cached_tokens for answer in together)
    assert cached == [0, *[512] * 5]


def test_logprobs_are_those_of_transformers(wire: Wire, model: Any) -> None:
    count = 20
    requests: list[dict[str, Any]] = [
        {
            "prompt_token_ids": [7 * number + 1, 300, 301, 302],
            "sampling": {**REQUESTS[number]["sampling"], "logprobs": count},
        }
        for number in range(0, len(REQUESTS), 5)
    ]
    for request, answer in zip(requests, wire.run(*requests), strict=True):
        assert len(answer.logprobs) == len(answer.token_ids)
        prompt = request["prompt_token_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer.token_ids])).logits[0]
        expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
        for entry, token, row in zip(answer.logprobs, answer.token_ids, expected, strict=True):
            assert entry[0][0] == token, "the chosen token comes first"
            assert len(entry) == count + 1
            for token_id, value in entry:
                assert value == pytest.approx(float(row[token_id]), abs=1e-3)
            likeliest = [value for _, value in entry[1:]]
            assert likeliest == sorted(likeliest, reverse=True)
            assert len({token_id for token_id, _ in entry[1:]}) == count
            assert likeliest == pytest.approx(row.topk(count).values.tolist(), abs=1e-3)


def test_any_number_of_logprobs_leaves_greedy_output_as_it_is(wire: Wire) -> None:
    (plain,) = wire.run(greedy(max_tokens=12))
    assert plain.logprobs == []
    answers = wire.run(*(greedy(max_tokens=12, logprobs=k) for k in range(21)))
    for count, answer in enumerate(answers):
        assert answer.token_ids == plain.token_ids
        assert [len(entry) for entry in answer.logprobs] == [count + 1] * 12
        if count:
            assert [entry[0] for entry in answer.logprobs] == [
                pytest.approx(entry[1]) for entry in answer.logprobs
            ], "greedy: the chosen is the likeliest"


def test_parameters_that_leave_one_token_are_greedy(wire: Wire) -> None:
    (expected,) = wire.run(greedy(max_tokens=16))
    filters: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}]
    for answer in wire.run(
        *(
            {"prompt": STORY, "sampling": {"temperature": 2.0, "max_tokens": 16, **only}}
            for only in filters
        ),
    ):
        assert answer.token_ids == expected.token_ids


def test_every_finish_reason_of_an_output(wire: Wire) -> None:
    eos = ModelConfig.from_checkpoint(DEMO_CHECKPOINT).eos_token_ids
    assert eos
    (story,) = wire.run(greedy(max_tokens=1000))
    tokens = story.token_ids
    assert story.finish.finish_reason == "stop", "a story ends by itself"
    assert tokens[-1] in eos
    assert not set(tokens[:-1]) & set(eos)
    assert story.text.rstrip().endswith((".", "!", '"'))

    end_of_phrase = tokens[30]
    assert end_of_phrase not in tokens[:9]
    assert tokens[10] not in tokens[:10]
    one, ten, exact, beyond, stopped, unseen = wire.run(
        greedy(max_tokens=1),
        greedy(max_tokens=10),
        greedy(max_tokens=len(tokens)),
        greedy(max_tokens=len(tokens) + 10, ignore_eos=True),
        greedy(max_tokens=1000, stop_token_ids=[end_of_phrase, tokens[8]]),
        greedy(max_tokens=10, stop_token_ids=[tokens[10]]),
    )
    for answer, length in ((one, 1), (ten, 10)):
        assert answer.token_ids == tokens[:length]
        assert answer.finish.finish_reason == "length"
        assert answer.finish.usage.completion_tokens == length
    assert exact.token_ids == tokens
    assert exact.finish.finish_reason == "stop", "the last token that it may have is the end"
    assert beyond.token_ids[: len(tokens)] == tokens
    assert (len(beyond.token_ids), beyond.finish.finish_reason) == (len(tokens) + 10, "length")
    first = tokens.index(tokens[8])
    assert stopped.token_ids == tokens[: first + 1], "the stop token is the last one"
    assert stopped.finish.finish_reason == "stop"
    assert (unseen.token_ids, unseen.finish.finish_reason) == (tokens[:10], "length")


def test_a_stop_token_holds_also_where_eos_is_ignored(wire: Wire) -> None:
    (story,) = wire.run(greedy(max_tokens=1000))
    end = story.token_ids[-1]
    (answer,) = wire.run(greedy(max_tokens=1000, ignore_eos=True, stop_token_ids=[end]))
    assert answer.token_ids == story.token_ids
    assert answer.finish.finish_reason == "stop"


def near(got: Logprobs, want: Logprobs) -> bool:
    """Whether the values agree; tokens computed in another batch differ in their last bits."""
    return len(got) == len(want) and all(
        [token for token, _ in a] == [token for token, _ in b]
        and [value for _, value in a] == pytest.approx([value for _, value in b], abs=1e-3)
        for a, b in zip(got, want, strict=True)
    )
