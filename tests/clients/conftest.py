"""A server whose model uses the tools that it is given, and fills the schemas, as no small model
does reliably."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from nanovllm.protocol import Accepted, Delta, Generate
from tests.client.double import SEED, Answer, finish, ingress
from tests.http.conftest import server
from tests.http.server import Server, serving

__all__ = ["obedient", "server"]

VALUES: dict[str, Any] = {
    "integer": 3,
    "number": 2.5,
    "boolean": True,
    "string": "你好啊集团 こんにちは",
}


def instance(schema: dict[str, Any]) -> dict[str, Any]:
    """An object that has all properties of the schema."""
    properties = schema.get("properties", {}).items()
    return {name: VALUES.get(what.get("type"), VALUES["string"]) for name, what in properties}


def obey(message: Any, session: str) -> Iterator[Answer]:
    """Writes the object that is asked for; or calls the first tool, if there are any and their
    answers have not come; or says hello."""
    if not isinstance(message, Generate):
        return
    last = (message.messages or [{}])[-1]
    text = "Hello, world."
    asked = message.sampling.structured_outputs
    if asked is not None and asked.json_schema is not None:
        text = msgspec.json.encode(instance(msgspec.json.decode(asked.json_schema))).decode()
    elif asked is not None and asked.json_object:
        # The prompt has the keys in quotes.
        keys = re.findall(r"'(\w+)'", str(last["content"]))
        text = msgspec.json.encode(dict.fromkeys(keys, VALUES["string"])).decode()
    elif message.tools and last.get("role") != "tool":
        function = message.tools[0]["function"]
        arguments = instance(function.get("parameters", {}))
        call = msgspec.json.encode({"name": function["name"], "arguments": arguments}).decode()
        text = f"<tool_call>\n{call}\n</tool_call>"
    for stop in message.sampling.stop:
        text = text.partition(stop)[0]
    if not message.stream:
        yield finish(message, "stop", text=text, token_ids=[1], answer_at=0, seed=SEED)
        return
    yield Accepted(id=message.id, session=session, seed=SEED)
    for offset, begin in enumerate(range(0, len(text), 5)):
        delta = Delta(id=message.id, offset=offset, token_ids=[1], text=text[begin : begin + 5])
        if not offset:
            delta.answer_at = 0
        yield delta
    yield finish(message, "stop")


@pytest.fixture(scope="module")
def obedient() -> Iterator[Server]:
    with ingress(obey) as double, serving(double.endpoint) as server:
        yield server
