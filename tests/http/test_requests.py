"""What is refused, and which key is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nanovllm.checkpoint.generation import read_sampling_defaults
from nanovllm.client.results import RequestError
from nanovllm.services.http.context import ServedModel
from nanovllm.services.http.errors import ApiError, api_error
from nanovllm.services.http.openai.chat import template_keys
from nanovllm.services.http.openai.requests import (
    ChatRequest,
    CompletionRequest,
    TokenizeRequest,
    is_continued,
)
from nanovllm.services.http.parsing import Keys, parse
from nanovllm.services.http.sampling import sampling

USER = {"role": "user", "content": "Hi"}
BEGUN = {"role": "assistant", "content": "Once"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


def refusal(kind: type[Keys], keys: dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as refused:
        parse(msgspec.json.encode(keys), kind)
    assert refused.value.status == 400
    return refused.value


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ({"messages": [{"role": "bot", "content": "x"}]}, "user, assistant or tool"),
        ({"tool_choice": "bot"}, "auto, none or required"),
        ({"response_format": {"type": "bot"}}, "text, json_object or json_schema"),
    ],
)
def test_a_value_that_there_is_not_is_refused_with_those_that_there_are(
    keys: dict[str, Any], values: str
) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "x"}], **keys}
    with pytest.raises(ApiError, match=f"'bot'; must be .*{values}"):
        parse(json.dumps(body).encode(), ChatRequest)


@pytest.mark.parametrize(
    ("keys", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role"),
        ({"messages": [USER, {"content": ""}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type"),
        ({"model": 3}, "model"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"min_tokens": 10**30}, "min_tokens"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": "1"}, "max_completion_tokens"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ],
)
def test_a_wrong_value_is_refused_by_name(keys: dict[str, Any], param: str) -> None:
    error = refusal(ChatRequest, {"model": "m", "messages": [USER], **keys})
    assert error.body.param == param
    assert error.body.message.startswith(param)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (ChatRequest, {"functions": []}),
        (ChatRequest, {"modalities": ["text", "audio"]}),
        (ChatRequest, {"audio": {}}),
        (ChatRequest, {"reasoning_effort": "low"}),
        (CompletionRequest, {"suffix": "x"}),
        (CompletionRequest, {"best_of": 2}),
        (ChatRequest, {"best_of": 2}),
        (ChatRequest, {"echo": True}),
        (ChatRequest, {"chat_template": "x"}),
        (ChatRequest, {"documents": []}),
        (ChatRequest, {"add_special_tokens": True}),
        (ChatRequest, {"include_reasoning": False}),
        (CompletionRequest, {"add_special_tokens": False}),
        (CompletionRequest, {"logits_processors": []}),
        (CompletionRequest, {"priority": 1}),
        (ChatRequest, {"truncate_prompt_tokens": 5}),
        (CompletionRequest, {"use_beam_search": True}),
        (CompletionRequest, {"return_token_ids": True}),
    ],
)
def test_what_is_not_served_is_refused_and_never_ignored(
    kind: type[Keys], keys: dict[str, Any]
) -> None:
    rest = {"messages": [USER]} if kind is ChatRequest else {"prompt": "x"}
    error = refusal(kind, {"model": "m", **rest, **keys})
    assert "served" in error.body.message
    assert error.body.param is not None
    assert error.body.param.startswith(next(iter(keys)))


def test_values_that_change_nothing_and_unknown_keys_are_taken() -> None:
    keys: dict[str, Any] = {
        "response_format": {"type": "text"},
        "presence_penalty": 0,
        "logit_bias": {},
        "n": None,
        "stop": None,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "functions": None,
        "metadata": {"a": "b"},
        "never_heard_of": [1],
    }
    ask = parse(msgspec.json.encode({"model": "m", "messages": [USER], **keys}), ChatRequest)
    assert ask.tool_choice == "auto"


@pytest.mark.parametrize(
    ("last", "keys", "continued"),
    [
        (USER, {}, False),
        (USER, {"continue_final_message": False, "add_generation_prompt": True}, False),
        (BEGUN, {}, True),
        (BEGUN, {"continue_final_message": True, "add_generation_prompt": False}, True),
        (BEGUN, {"add_generation_prompt": False}, True),
        (BEGUN, {"continue_final_message": False}, False),
        ({"role": "assistant", "content": [{"type": "text", "text": ""}]}, {}, False),
        ({"role": "assistant", "content": [{"type": "text", "text": "Once"}]}, {}, True),
        (USER, {"continue_final_message": True}, "continue_final_message"),
        (USER, {"add_generation_prompt": False}, "add_generation_prompt"),
        (BEGUN, {"add_generation_prompt": True}, "add_generation_prompt"),
    ],
)
def test_the_last_message_is_continued_as_asked(
    last: dict[str, Any], keys: dict[str, bool], continued: bool | str
) -> None:
    kinds: tuple[type[ChatRequest | TokenizeRequest], ...] = (ChatRequest, TokenizeRequest)
    for kind in kinds:
        ask = parse(msgspec.json.encode({"model": "m", "messages": [USER, last], **keys}), kind)
        if isinstance(continued, bool):
            assert is_continued(ask) == continued
        else:
            with pytest.raises(ApiError, match=f"^{continued}: "):
                is_continued(ask)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_a_prompt_has_four_forms(prompt: Any, prompts: Any) -> None:
    body = msgspec.json.encode({"model": "m", "prompt": prompt})
    assert parse(body, CompletionRequest).prompts == prompts


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], ["a", 1], [1, [2]], [-1], None, [None]])
def test_a_prompt_of_no_form_is_refused(prompt: Any) -> None:
    with pytest.raises(ApiError, match="prompt"):
        parse(msgspec.json.encode({"model": "m", "prompt": prompt}), CompletionRequest).prompts  # noqa: B018


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"nil", b"[]", b"\xff", b'{"model": "\xff"}', b'{"model": "\\ud800"}'),
        b'{"x":' + b"[" * 100_000,
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        parse(body, ChatRequest)
    assert refused.value.status == 400


@pytest.mark.parametrize("value", [b'"\xff"', b"1e400", b'{"\xff": 1}'])
def test_what_is_no_json_in_a_key_for_the_template_is_refused(value: bytes) -> None:
    body = b'{"model": "m", "messages": [{"role": "user", "content": "", "name": "", "x": %s}]}'
    parse(body % value, ChatRequest)  # passes over keys that it does not know
    with pytest.raises(ApiError) as refused:
        template_keys(body % value)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("said", "param", "message"),
    [
        ("sampling.logit_bias: 999 is no token", "logit_bias", "logit_bias: 999 is no token"),
        ("prompt_token_ids: 999 is no token", "prompt", "prompt: 999 is no token"),
        ("messages[0].content: no", "messages[0].content", "messages[0].content: no"),
        ("the prompt: too long", None, "the prompt: too long"),
        (
            "of max_pending_requests (2) 2 are held, 1 of them for this session; try later",
            None,
            "the server holds as many requests as it may; try again later",
        ),
        ("idle: no key", None, "idle: no key"),
    ],
)
def test_a_refusal_of_the_pipeline_names_the_key_as_http_clients_know_it(
    said: str, param: str | None, message: str
) -> None:
    error = api_error(RequestError("invalid_request", said))
    assert (error.body.param, error.body.message) == (param, message)


def test_tokenize_takes_one_of_prompt_and_messages() -> None:
    assert refusal(TokenizeRequest, {}).body.param == "prompt"
    assert refusal(TokenizeRequest, {"prompt": "a", "messages": [USER]}).body.param == "prompt"


def test_the_checkpoint_says_how_to_sample_where_the_request_does_not(tmp_path: Path) -> None:
    said = {"top_p": 0.8, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05}
    (tmp_path / "generation_config.json").write_text(json.dumps({**said, "do_sample": True}))
    defaults = read_sampling_defaults(tmp_path)
    model = ServedModel("m", tmp_path, 4096, defaults, {}, frozenset(), None)
    for asked in ({}, {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}):
        body = msgspec.json.encode({"model": "m", "prompt": "x", **asked})
        drawn = sampling(parse(body, CompletionRequest), model, None)
        assert {key: getattr(drawn, key) for key in said} == (asked or said)
        assert drawn.temperature == 1.0
