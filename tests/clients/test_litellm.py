"""The `litellm` package as a client."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.http.server import Server

litellm = pytest.importorskip("litellm")

HELLO = [{"role": "user", "content": "Hello."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


def ask(server: Server, **keys: Any) -> Any:
    return litellm.completion(
        **{"model": "hosted_vllm/demo", "messages": HELLO, **keys},
        api_base=f"{server.url}/v1",
        api_key="none",
        num_retries=0,
    )


def test_a_stream_says_what_the_whole_does(server: Server) -> None:
    whole = ask(server, seed=5, max_tokens=20)
    chunks = list(ask(server, seed=5, max_tokens=20, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls(obedient: Server, stream: bool) -> None:
    answer = ask(obedient, tools=[TOOL], stream=stream)
    if stream:
        answer = litellm.stream_chunk_builder(list(answer), messages=HELLO)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 3})


def test_errors(server: Server) -> None:
    with pytest.raises(litellm.NotFoundError):
        ask(server, model="hosted_vllm/other")
    with pytest.raises(litellm.BadRequestError):
        ask(server, temperature=11)
