"""The streams of `streams`, asked by the openai package over HTTP."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

from openai import AsyncOpenAI

from tests.recovery.streams import TIMEOUT_S, Case, Outcome, Streamed

# Tools make the door look for calls in every piece of text.
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


def http_client(url: str) -> AsyncOpenAI:
    """A client that tries nothing again: a death may be no more than a pause."""
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=TIMEOUT_S, max_retries=0)


async def stream_over_http(
    client: AsyncOpenAI, number: int, case: Case, news: threading.Event
) -> Streamed:
    """Asks a case. The outcome has no token ids; a chat's text is the JSON of its content,
    reasoning, and the names and arguments of its tool calls. A client that leaves has as many
    characters as the case has tokens."""
    pieces: dict[str, str] = {}
    reason, completion_tokens = "", -1
    times = [time.monotonic()]
    chunks: AsyncIterator[Any] = await _asked(client, case)
    async for chunk in chunks:
        if chunk.usage is not None:
            completion_tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            for name, piece in _pieces(choice):
                pieces[name] = pieces.get(name, "") + piece
        times.append(time.monotonic())
        news.set()
        said = "".join(pieces.values())
        if case.leaves_after is not None and len(said) >= case.leaves_after:
            await chunks.close()  # type: ignore[attr-defined]
            outcome = Outcome([], said[: case.leaves_after], "left", case.leaves_after)
            return Streamed(number, outcome, times)
    if not reason or completion_tokens < 0:
        raise RuntimeError(f"{case}: the stream has no end: {pieces}")
    text = pieces["text"] if isinstance(case.prompt, str) else json.dumps(pieces, sort_keys=True)
    return Streamed(number, Outcome([], text, reason, completion_tokens), times)


async def _asked(client: AsyncOpenAI, case: Case) -> Any:
    params = case.params
    keys: dict[str, Any] = {
        "model": "demo",
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_tokens": params.max_tokens,
        "seed": params.seed,
        "stop": params.stop,
        "stream": True,
        "stream_options": {"include_usage": True},
        "extra_body": {"ignore_eos": params.ignore_eos, "top_k": 0, "min_p": 0},
    }
    if isinstance(case.prompt, str):
        return await client.completions.create(prompt=case.prompt, logprobs=params.logprobs, **keys)
    keys |= {"messages": case.prompt, "tools": TOOLS}
    if params.logprobs is not None:
        keys |= {"logprobs": True, "top_logprobs": params.logprobs}
    return await client.chat.completions.create(**keys)


def _pieces(choice: Any) -> list[tuple[str, str]]:
    """New text of a choice, each with the name of what it continues."""
    if not hasattr(choice, "delta"):
        return [("text", choice.text)]
    delta = choice.delta
    pieces = [("content", delta.content), ("reasoning", getattr(delta, "reasoning_content", None))]
    for call in delta.tool_calls or []:
        pieces.append((f"name {call.index}", call.function.name))
        pieces.append((f"arguments {call.index}", call.function.arguments))
    return [(name, piece) for name, piece in pieces if piece]
