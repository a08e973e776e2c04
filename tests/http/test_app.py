"""The small routes, and errors of every status, before a running pipeline."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

import nanovllm
from benchmarks.support.pipeline import Pipeline
from nanovllm import Client, SamplingParams
from tests.client.double import ingress, say_nothing
from tests.http.server import HELLO, Server, serving


def test_it_is_alive_and_ready(server: Server) -> None:
    assert server.get("/health").status == 200
    assert server.get("/ready").status == 200
    assert server.get("/version").json == {"version": nanovllm.__version__}


def test_it_is_alive_but_not_ready_without_a_pipeline() -> None:
    with (
        ingress(say_nothing, say_nothing) as double,
        serving(double.endpoint, timeout=0.5) as server,
    ):
        assert server.get("/health").status == 200
        answer = server.get("/ready")
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert answer.json["error"]["code"] == "unavailable"
        for stream in (False, True):
            assert server.chat(stream=stream).status == 503


def test_models(server: Server) -> None:
    (card,) = server.get("/v1/models").json["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("demo", "model", 4096)
    assert server.get("/v1/models/demo").json == card
    answer = server.get("/v1/models/org/other")
    assert (answer.status, answer.json["error"]["code"]) == (404, "model_not_found")
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
        body = {"model": "other", "messages": HELLO, "prompt": "x"}
        if path == "/tokenize":
            del body["messages"]
        assert server.post(path, body).status == 404


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("DELETE", "/health", 405),
        ("POST", "/tokenize", 400),
    ],
)
def test_every_error_is_of_openais_form(
    server: Server, method: str, path: str, status: int
) -> None:
    answer = server.ask(method, path, b"")
    assert answer.status == status
    assert answer.headers["content-type"] == "application/json"
    error = answer.json["error"]
    assert error["message"]
    assert error["type"]
    assert {"param", "code"} <= error.keys()


def test_tokens_are_those_of_the_pipeline(server: Server, pipeline: Pipeline) -> None:
    with Client(pipeline.endpoint) as client:
        params = SamplingParams(max_tokens=1)
        for keys, prompt in (({"messages": HELLO}, HELLO), ({"prompt": "Grüezi"}, "Grüezi")):
            tokens = server.post("/tokenize", {**keys, "return_token_strs": True}).json
            assert tokens["count"] == client.generate(prompt, params).usage.prompt_tokens
            assert len(tokens["tokens"]) == len(tokens["token_strs"]) == tokens["count"]
            assert tokens["max_model_len"] == 4096
    text = server.post("/detokenize", {"tokens": tokens["tokens"]}).json
    assert text == {"prompt": "Grüezi"}
    assert server.post("/detokenize", {"tokens": [3, 99999]}).json["error"]["param"] == "tokens[1]"


def test_what_the_template_does_not_take_is_named(server: Server) -> None:
    for keys, param in (
        ({"chat_template_kwargs": {"tools": 5}}, "chat_template_kwargs"),
        ({"messages": [{"role": "assistant", "content": "</think>"}]}, "messages"),
    ):
        for path in ("/v1/chat/completions", "/tokenize"):
            answer = server.post(path, {"model": "demo", "messages": HELLO, **keys})
            assert (answer.status, answer.json["error"]["param"]) == (400, param)


def test_the_description_is_whole(server: Server) -> None:
    answer = server.get("/openapi.json")
    described = answer.json
    names = set(re.findall(rb'"#/components/schemas/(\w+)"', answer.body))
    assert {name.decode() for name in names} <= described["components"]["schemas"].keys()
    for path, operations in described["paths"].items():
        (method,) = operations
        assert server.ask(method.upper(), path.format(id="demo"), b"{}").status in (200, 400)
    keys = described["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "temperature", "tools", "min_p"} <= keys.keys()


@pytest.mark.parametrize(
    "keys",
    [
        {"chat_template_kwargs": {"a": 2**70}},
        {"chat_template_kwargs": {"tokenize": True}},
        {
            "messages": [
                {"role": "user", "content": "x", "deep": msgspec.Raw(b"[" * 40 + b"]" * 40)}
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "x", "deep": msgspec.Raw(b"[" * 400 + b"]" * 400)}
            ]
        },
        {"stop_token_ids": [99999]},
        {"messages": [{"role": "user", "content": "many words " * 4096}]},
        {"messages": [{"role": "user", "content": "x" * (9 << 20)}]},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_pipeline_does_not_take_is_a_400(
    server: Server, keys: dict[str, Any], stream: bool
) -> None:
    body = {"model": "demo", "messages": HELLO, "stream": stream, **keys}
    answer = server.post("/v1/chat/completions", msgspec.json.encode(body))
    assert answer.status == 400, answer.body[:300]
    assert server.chat(max_tokens=1).status == 200
