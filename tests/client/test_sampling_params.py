import json
from dataclasses import fields
from typing import Any

import msgspec
import numpy as np
import pytest

from nanovllm import SamplingParams, StructuredOutputs
from nanovllm.protocol import Sampling

CYCLE: dict[str, Any] = {}
CYCLE["json_schema"] = CYCLE


def test_positional_order_is_nano_vllms() -> None:
    params = SamplingParams(0.6, 256, True)
    assert (params.temperature, params.max_tokens, params.ignore_eos) == (0.6, 256, True)


def test_defaults_are_the_protocols() -> None:
    assert SamplingParams().to_wire() == Sampling()
    defaults = {field.name: field.default for field in fields(SamplingParams)}
    del defaults["n"]
    told = {name: value for name, value in defaults.items() if value not in (None, ())}
    assert msgspec.convert(told, Sampling) == Sampling()
    assert not any(getattr(Sampling(), name) for name in defaults.keys() - told.keys())


def test_greedy_and_integers_for_floats_are_allowed() -> None:
    assert SamplingParams(temperature=0, top_p=1).to_wire().temperature == 0.0


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="END").to_wire().stop == ["END"]
    assert SamplingParams(stop=("a", "b"), stop_token_ids=(1, 2)).to_wire().stop == ["a", "b"]


def test_more_tokens_than_any_model_allows_are_not_refused() -> None:
    assert SamplingParams(max_tokens=10**30).to_wire().max_tokens >= 2**30


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("temperature", np.float64(0.5), 0.5),
        ("temperature", np.float32(0.5), 0.5),
        ("max_tokens", np.int64(5), 5),
        ("max_tokens", np.array(5), 5),
        ("ignore_eos", np.True_, True),
        ("stop", np.str_("END"), ["END"]),
        ("stop", "é" * 256, ["é" * 256]),
        ("stop", np.array(["a", "b"]), ["a", "b"]),
        ("stop", [np.str_("a")], ["a"]),
        ("stop_token_ids", np.array([1, 2]), [1, 2]),
        ("seed", np.uint8(3), 3),
        ("max_tokens", None, 64),
        ("stop", None, []),
        ("stop_token_ids", None, []),
        ("logit_bias", {np.int64(3): np.float32(1.5)}, {3: 1.5}),
        ("bad_words", [np.array([1, 2]), np.str_("a")], [[1, 2], "a"]),
    ],
)
def test_a_value_is_taken_for_what_it_is(name: str, value: Any, meant: Any) -> None:
    taken = SamplingParams(**{name: value}).to_wire()
    assert getattr(taken, name) == meant
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(taken), type=Sampling) == taken


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 10.5),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("temperature", None),
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("max_tokens", np.float64(2.0)),
        ("top_p", np.float32(1.5)),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", "é" * 257),
        ("stop", 5),
        ("stop_token_ids", [-1]),
        ("seed", 2**63),
        ("logprobs", 21),
        ("ignore_eos", "yes"),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 101}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", dict.fromkeys(range(301), 1.0)),
        ("repetition_penalty", 1e-30),
        ("min_tokens", 2**31),
        ("bad_words", "x"),
        ("bad_words", [[]]),
        ("stop", ["a", "\ud800"]),
        ("bad_words", ["\ud800"]),
        ("structured_outputs", CYCLE),
        ("structured_outputs", {"\ud800": 1}),
        ("temperature", "\ud800"),
        ("logit_bias", {(1, 2): 1}),
        ("n", [CYCLE]),
        ("structured_outputs", {"regex": "\ud800"}),
        ("structured_outputs", {"json_schema": {"const": "\ud800"}}),
        ("structured_outputs", {"json_schema": {"const": object()}}),
    ],
)
def test_a_parameter_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


def test_a_value_changed_later_is_checked_when_it_is_used() -> None:
    params = SamplingParams()
    params.top_k = -5
    with pytest.raises(ValueError, match="top_k=-5"):
        params.to_wire()


def test_structured_outputs_take_a_schema_as_a_dict_or_as_text() -> None:
    schema = {"type": "object", "properties": {"é": {}}}
    wire = SamplingParams(structured_outputs={"json_schema": schema}).to_wire().structured_outputs
    assert wire is not None
    assert wire.json_schema is not None
    assert json.loads(wire.json_schema) == schema
    text = StructuredOutputs(json_schema=wire.json_schema)
    assert SamplingParams(structured_outputs=text).to_wire().structured_outputs == wire
    for wrong, reason in (
        ({"json": schema}, "unknown field `json`"),
        ({"regex": "a", "choice": ["b"]}, "exactly one of"),
        ({"choice": []}, "length >= 1"),
    ):
        with pytest.raises(ValueError, match=reason) as refused:
            SamplingParams(structured_outputs=wrong)
        assert str(refused.value).startswith("structured_outputs={")
