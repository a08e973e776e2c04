"""Structured outputs through the whole pipeline."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from benchmarks.support.pipeline import Pipeline
from nanovllm.checkpoint import DEMO_CHECKPOINT, ModelConfig
from nanovllm.control import SchedulerStats
from nanovllm.grammars import Grammars
from nanovllm.protocol import StructuredOutputs
from tests.pipeline.wire import Answer, Wire
from tests.schemas import Schema, random_schema

MODEL = ModelConfig.from_checkpoint(DEMO_CHECKPOINT)
EOS = set(MODEL.eos_token_ids or ())
GRAMMARS = Grammars.from_checkpoint(DEMO_CHECKPOINT, MODEL)
SCHEMAS = 100
NO_END = dict.fromkeys(EOS, -100.0)
# Two ranks, and so few blocks that sequences are preempted.
FEW_BLOCKS = (
    "--dtype float32 --tp 2 --kvcache-block-size 16 --num-kvcache-blocks 24 --max-model-len 256"
)
SEVERAL: list[dict[str, Any]] = [
    {"regex": "[a-z ]{20,60}!"},
    {"choice": ["Once upon a time there was a fox.", "Once upon a time there was a hare."]},
    {"json_object": True},
    {"json_schema": json.dumps({"type": "array", "items": {"type": "integer"}, "maxItems": 30})},
    {"grammar": 'start: (WORD " "){8} WORD "."\nWORD: /[a-z]{2,8}/'},
]


def ask(outputs: dict[str, Any], **keys: Any) -> dict[str, Any]:
    sampling = {"temperature": 1.5, "max_tokens": 120, "seed": 0, **keys.pop("sampling", {})}
    sampling["structured_outputs"] = outputs
    return {"prompt": "Once upon a time", "sampling": sampling, **keys}


def random_schemas(seed: int, count: int) -> list[Schema]:
    draw = random.Random(seed)
    return [random_schema(draw) for _ in range(count)]


def check(answer: Answer, schema: Schema) -> None:
    """A finished output is of the schema; one that was cut goes on so."""
    assert answer.finish.finish_reason in ("stop", "length")
    if answer.finish.finish_reason == "stop":
        assert answer.token_ids[-1] in EOS
        jsonschema.validate(json.loads(answer.text), schema)
    else:
        GRAMMARS.matcher(StructuredOutputs(json_schema=json.dumps(schema)), None, answer.token_ids)


def test_every_finished_output_is_of_its_schema(pipeline: Pipeline) -> None:
    schemas = random_schemas(1, SCHEMAS)
    with Wire(pipeline.endpoint) as wire:
        answers = wire.ask_all(
            ask({"json_schema": json.dumps(schema)}, sampling={"seed": i}, stream=i % 2 == 0)
            for i, schema in enumerate(schemas)
        )
        wire.until(lambda: all(answer.end is not None for answer in answers), 100)
    for answer, schema in zip(answers, schemas, strict=True):
        check(answer, schema)
    finished = sum(answer.finish.finish_reason == "stop" for answer in answers)
    assert finished > SCHEMAS * 3 / 4


def test_other_kinds_of_outputs(wire: Wire) -> None:
    regex, choice, whole, numbers, grammar = wire.run(*(ask(outputs) for outputs in SEVERAL))
    assert re.fullmatch("[a-z ]{20,60}!", regex.text)
    assert choice.text in SEVERAL[1]["choice"]
    if whole.finish.finish_reason == "stop":
        assert isinstance(json.loads(whole.text), dict)
    check(numbers, json.loads(SEVERAL[3]["json_schema"]))
    assert re.fullmatch(r"([a-z]{2,8} ){8}[a-z]{2,8}\.", grammar.text)


def test_same_tokens_on_two_ranks_preempted_and_resumed(
    pipeline: Pipeline, start_pipeline: Callable[..., Pipeline]
) -> None:
    requests = [ask(outputs, sampling={"seed": seed}) for seed in range(3) for outputs in SEVERAL]
    with Wire(pipeline.endpoint) as wire:
        expected = [answer.token_ids for answer in wire.run(*requests)]
        resumed = wire.run(
            *(
                {**request, "resume_token_ids": output[: 7 * i]}
                for i, (request, output) in enumerate(zip(requests, expected, strict=True))
            )
        )
    for i, (answer, output) in enumerate(zip(resumed, expected, strict=True)):
        assert answer.token_ids == output[7 * i :]
    running = start_pipeline(DEMO_CHECKPOINT, *FEW_BLOCKS.split())
    with Wire(running.endpoint) as wire:
        assert [answer.token_ids for answer in wire.run(*requests)] == expected
    assert running.stats_once(SchedulerStats, lambda stats: stats.preemptions > 0)


def test_the_grammar_begins_where_the_answer_does(wire: Wire) -> None:
    # Any two tokens can mark reasoning.
    opening, closing = 300, 301
    outputs = {"choice": ["yes", "no"]}
    keys: dict[str, Any] = {"reasoning": {"open": opening, "close": closing}}
    prompt: dict[str, Any] = {"prompt": None, "prompt_token_ids": [310, opening, 311]}
    bias: dict[str, Any] = {"sampling": {"logit_bias": {opening: 100.0}, "max_tokens": 300}}
    inside, opened, straight = wire.run(
        ask(outputs, **keys, **prompt, sampling={"logit_bias": {closing: 5.0}, "max_tokens": 300}),
        ask(outputs, **keys, resume_token_ids=[opening, 5, closing]),
        ask(outputs, **keys, sampling={"logit_bias": {opening: -100.0}}),
    )
    for answer in (inside, opened, straight):
        assert answer.finish.finish_reason == "stop"
    assert inside.answer_at is not None
    assert closing in inside.token_ids
    assert inside.text[inside.answer_at :] in outputs["choice"]
    assert opened.text in outputs["choice"]
    assert straight.text in outputs["choice"]
    (never,) = wire.run(ask(outputs, **keys, **bias))
    assert never.token_ids[0] == opening
    assert not EOS & set(never.token_ids), "reasoning does not end the output"


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (ask({"regex": "["}), "sampling.structured_outputs: invalid regex"),
        (ask({"json_schema": '{"if": {}}'}), "sampling.structured_outputs: Unimplemented"),
        (ask({"regex": "a", "choice": ["b"]}), "sampling.structured_outputs: exactly one"),
        (ask({"regex": "a+"}, resume_token_ids=[5]), "resume_token_ids: "),
        (ask({"regex": "a+"}, sampling={"ignore_eos": True}), "sampling.ignore_eos: "),
        (ask({"regex": "aaaa"}, sampling={"min_tokens": 100}), "sampling: after "),
    ],
)
def test_what_cannot_be_served_is_refused(wire: Wire, request_: dict[str, Any], named: str) -> None:
    (answer,) = wire.run({**request_, "stream": False})
    assert answer.error.code == "invalid_request"
    assert answer.error.message.startswith(named)


def test_parameters_beside_a_grammar_hold_too(wire: Wire) -> None:
    outputs = {"regex": "[a-z]{30}"}
    free, biased, few = wire.run(
        ask(outputs, sampling={"logprobs": 2}),
        ask(outputs, sampling={"frequency_penalty": 2.0, "bad_words": [[258]]}),
        ask(outputs, sampling={"allowed_token_ids": [*range(64, 96), *EOS], "top_p": 0.9}),
    )
    for answer in (free, biased, few):
        assert re.fullmatch(outputs["regex"], answer.text)
        assert answer.finish.finish_reason == "stop"
    assert 258 not in biased.token_ids
    assert set(few.token_ids) <= {*range(64, 96), *EOS}
    assert len(free.logprobs) == len(free.token_ids)


def test_a_costly_grammar_ends_alone(wire: Wire) -> None:
    # A text of n letters can be parsed in exponentially many ways.
    costly = ask({"grammar": "start: s\ns: s s | /[a-z ]/"}, sampling={"logit_bias": NO_END})
    answers = wire.run(*(ask(outputs) for outputs in SEVERAL))
    again = wire.ask_all([costly, *(ask(outputs) for outputs in SEVERAL)])
    wire.until(lambda: all(answer.end is not None for answer in again), 60)
    assert [a.token_ids for a in again[1:]] == [a.token_ids for a in answers]
    assert "too much work" in again[0].error.message
