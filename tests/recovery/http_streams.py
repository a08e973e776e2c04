"""The streams of `streams`, asked by the openai package over HTTP."""

from __future__ import annotations

import collections
import json
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from openai import AsyncOpenAI

from tests.recovery.streams import TIMEOUT_S, Case, Outcome, Streamed

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "get_weather", "description": "The weather in a city", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": FUNCTION}]

# The keys that are not OpenAI's.
EXTRA_KEYS = (
    *("ignore_eos", "top_k", "min_p", "repetition_penalty", "min_tokens", "bad_words"),
    *("allowed_token_ids", "include_stop_str_in_output", "skip_special_tokens"),
    "prompt_logprobs",
)


def http_client(url: str) -> AsyncOpenAI:
    """A client that tries nothing again: a death may be no more than a pause."""
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=TIMEOUT_S, max_retries=0)


async def stream_over_http(
    client: AsyncOpenAI, number: int, case: Case, news: threading.Event
) -> Streamed:
    """Asks a case. The outcome has no token ids; its text is the JSON of what each choice has:
    text, or content, reasoning, names and arguments of tool calls, the prompt's tokens, and the
    reason of its end. A client that leaves has as many characters of the first choice as the case
    has tokens."""
    choices: list[dict[str, str]] = [{} for _ in range(case.params.n)]
    completion_tokens = -1
    times = [time.monotonic()]
    chunks: AsyncIterator[Any] = await _asked(client, case)
    async for chunk in chunks:
        if chunk.usage is not None:
            completion_tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            pieces = choices[choice.index]
            for name, piece in _pieces(choice):
                pieces[name] = pieces.get(name, "") + piece
        times.append(time.monotonic())
        news.set()
        said = "".join(choices[0].values())
        if case.leaves_after is not None and len(said) >= case.leaves_after:
            await chunks.close()  # type: ignore[attr-defined]
            outcome = Outcome([], said[: case.leaves_after], "left", case.leaves_after)
            return Streamed(number, outcome, times)
    if completion_tokens < 0 or not all("reason" in pieces for pieces in choices):
        raise RuntimeError(f"{case}: the stream has no end: {choices}")
    text = json.dumps(choices, sort_keys=True)
    return Streamed(number, Outcome([], text, "each its own", completion_tokens), times)


def chat_parts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many answers of chats have content, reasoning and a tool call."""
    found: collections.Counter[str] = collections.Counter()
    for outcome in outcomes:
        if outcome.finish_reason != "left":
            found.update(name for choice in json.loads(outcome.text) for name in choice)
    names = {"content": "content", "reasoning": "reasoning", "tool_call": "arguments 0"}
    return {name: found[piece] for name, piece in names.items()}


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
        "extra_body": {name: getattr(params, name) for name in EXTRA_KEYS},
        "frequency_penalty": params.frequency_penalty,
        "presence_penalty": params.presence_penalty,
        "logit_bias": params.logit_bias or {},
        "n": params.n,
    }
    outputs = params.structured_outputs
    if isinstance(outputs, dict):
        keys["extra_body"]["structured_outputs"] = {
            key.removesuffix("_schema"): value for key, value in outputs.items()
        }
    if isinstance(case.prompt, str):
        return await client.completions.create(prompt=case.prompt, logprobs=params.logprobs, **keys)
    keys["messages"] = case.prompt
    if outputs is None:
        keys["tools"] = TOOLS
    if params.logprobs is not None:
        keys |= {"logprobs": True, "top_logprobs": params.logprobs}
    return await client.chat.completions.create(**keys)


def _pieces(choice: Any) -> list[tuple[str, str]]:
    """What is new of a choice, each with the name of what it continues."""
    told = getattr(choice, "prompt_logprobs", None)
    prompt = "" if told is None else json.dumps([next(iter(entry)) for entry in told[1:]])
    pieces: list[tuple[str, str | None]] = [("prompt", prompt)]
    if hasattr(choice, "delta"):
        delta = choice.delta
        pieces.append(("content", delta.content))
        pieces.append(("reasoning", getattr(delta, "reasoning_content", None)))
        for call in delta.tool_calls or []:
            pieces.append((f"name {call.index}", call.function.name))
            pieces.append((f"arguments {call.index}", call.function.arguments))
    else:
        pieces.append(("text", choice.text))
    pieces.append(("reason", choice.finish_reason))
    return [(name, piece) for name, piece in pieces if piece]
