"""The `openai` package as a client, before a running pipeline."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from benchmarks.support.pipeline import Pipeline
from nanovllm import Client, SamplingParams
from tests.http.server import Server

STORY: list[Any] = [{"role": "user", "content": "Tell me a story."}]
NO_THINKING: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
FOUND = '{"temperature": 12, "sky": "rain"}'
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "nanovllm"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_chat_says_what_the_pipeline_does(client: openai.OpenAI, pipeline: Pipeline) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=STORY,
        seed=7,
        max_tokens=40,
        temperature=1,
        extra_body=NO_THINKING,
    )
    with Client(pipeline.endpoint) as raw:
        params = SamplingParams(seed=7, max_tokens=40)
        expected = raw.chat(STORY, params, **NO_THINKING)
    (choice,) = answer.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert answer.usage.completion_tokens == expected.usage.completion_tokens


def test_a_stream_says_what_the_whole_does(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "demo",
        "messages": STORY,
        "seed": 3,
        "n": 2,
        "max_tokens": 60,
        "logprobs": True,
        "top_logprobs": 2,
        "stop": ["forest", "."],
        "extra_body": NO_THINKING,
    }
    whole = client.chat.completions.create(**asked)
    texts, reasons, logprobs = ["", ""], ["", ""], [[], []]  # type: ignore[var-annotated]
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or ""
            logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
        usage = chunk.usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert whole.usage is not None
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    for choice in whole.choices:
        assert choice.logprobs is not None
        entries = choice.logprobs.content or []
        assert [entry.token for entry in entries] == [e.token for e in logprobs[choice.index]]
        raw = b"".join(bytes(entry.bytes or []) for entry in logprobs[choice.index])
        assert raw.decode(errors="replace").startswith(texts[choice.index])
        for entry in logprobs[choice.index]:
            assert len(entry.top_logprobs) == 2


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_a_chat_has_what_the_model_thinks_beside_its_answer(
    client: openai.OpenAI, pipeline: Pipeline, thinking: bool, stream: bool
) -> None:
    template = {"enable_thinking": thinking}
    with Client(pipeline.endpoint) as raw:
        params = SamplingParams(temperature=0, max_tokens=100)
        whole = raw.chat("Who lives in the harbour?", params, chat_template_kwargs=template)
    thought, _, answer = whole.text.rpartition("</think>")
    said = asked(
        client,
        [{"role": "user", "content": "Who lives in the harbour?"}],
        stream,
        extra_body={"chat_template_kwargs": template},
    )
    assert said["content"] == answer.lstrip("\n")
    assert answer.strip().startswith("Pip the fox")
    assert said["reasoning"].strip() == thought.removeprefix("<think>").strip()
    assert bool(thought) == thinking


@pytest.mark.parametrize("stream", [True, False])
def test_the_model_calls_a_tool_and_says_what_that_has_answered(
    client: openai.OpenAI, stream: bool
) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Bern?"}]
    said = asked(client, messages, stream, tools=TOOLS)
    assert said["finish_reason"] == "tool_calls"
    assert said["reasoning"]
    assert said["name"] == "get_weather"
    assert list(json.loads(said["arguments"])) == ["city"]
    function = {"name": said["name"], "arguments": said["arguments"]}
    call = {"id": said["id"], "type": "function", "function": function}
    messages += [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": said["id"], "content": FOUND},
    ]
    said = asked(client, messages, stream, tools=TOOLS)
    assert said["finish_reason"] == "stop"
    assert " degrees: " in said["content"]


def asked(client: openai.OpenAI, messages: list[Any], stream: bool, **keys: Any) -> dict[str, str]:
    """The greedy answer's texts, joined, those of a tool call among them."""
    ask: dict[str, Any] = {"model": "demo", "messages": messages, "temperature": 0}
    answer: Any = client.chat.completions.create(**ask, max_tokens=100, stream=stream, **keys)
    said: dict[str, str] = {}
    for part in answer if stream else [answer]:
        (choice,) = part.choices
        message = choice.delta if stream else choice.message
        found = {"content": message.content, "finish_reason": choice.finish_reason}
        found["reasoning"] = getattr(message, "reasoning_content", None)
        for call in message.tool_calls or ():
            found |= {"id": call.id, **dict(call.function)}
        for name, text in found.items():
            said[name] = said.get(name, "") + (text or "")
    return said


def test_extra_keys_reach_the_pipeline(client: openai.OpenAI) -> None:
    greedy = client.chat.completions.create(
        model="demo", messages=STORY, max_tokens=20, temperature=0, extra_body=NO_THINKING
    )
    one = client.chat.completions.create(
        model="demo",
        messages=STORY,
        max_tokens=20,
        temperature=1,
        extra_body={"top_k": 1, **NO_THINKING},
    )
    assert one.choices[0].message.content == greedy.choices[0].message.content


def test_sampling_parameters_reach_the_pipeline(client: openai.OpenAI, pipeline: Pipeline) -> None:
    asked: dict[str, Any] = {"presence_penalty": 1.5, "frequency_penalty": 0.5}
    asked |= {"repetition_penalty": 1.2, "min_tokens": 5, "bad_words": ["was", [300, 301]]}
    asked |= {"allowed_token_ids": list(range(250, 900)), "skip_special_tokens": False}
    asked |= {"stop": [" a"], "include_stop_str_in_output": True}
    params = SamplingParams(temperature=0, max_tokens=40, logit_bias={400: 3.0}, seed=1, **asked)
    with Client(pipeline.endpoint) as direct:
        expected = direct.generate("Once upon a time", params)
    of_openai = {
        name: asked.pop(name) for name in ("presence_penalty", "frequency_penalty", "stop")
    }
    answer = client.completions.create(
        model="demo",
        prompt="Once upon a time",
        temperature=0,
        max_tokens=40,
        logit_bias={"400": 3},
        seed=1,
        extra_body=asked,
        **of_openai,
    )
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason


def test_no_number_of_tokens_is_too_many(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo", prompt="Once", max_tokens=10**30, stop="a", temperature=0
    )
    assert answer.choices[0].finish_reason == "stop"


def test_an_assistants_message_is_continued(client: openai.OpenAI) -> None:
    begun = [*STORY, {"role": "assistant", "content": "Once upon a"}]
    answer = client.chat.completions.create(
        model="demo", messages=begun, max_tokens=1, temperature=0
    )
    assert answer.choices[0].message.content == " time"


def test_completions_come_in_order(client: openai.OpenAI) -> None:
    prompts = ["Once upon a time", "The fox", "A girl"]
    alone = [
        client.completions.create(model="demo", prompt=prompt, max_tokens=8, temperature=0)
        for prompt in prompts
    ]
    together = client.completions.create(
        model="demo", prompt=prompts, max_tokens=8, temperature=0, logprobs=1
    )
    assert [c.text for c in together.choices] == [a.choices[0].text for a in alone]
    assert together.usage is not None
    assert together.usage.prompt_tokens == sum(a.usage.prompt_tokens for a in alone if a.usage)
    for choice in together.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.text_offset is not None
        assert choice.logprobs.tokens is not None
        assert "".join(choice.logprobs.tokens) == choice.text
        begins = choice.logprobs.text_offset
        assert [choice.text[b:][: len(t)] for b, t in zip(begins, choice.logprobs.tokens)] == (  # noqa: B905
            choice.logprobs.tokens
        )
    streamed = ["", "", ""]
    for chunk in client.completions.create(
        model="demo", prompt=prompts, max_tokens=8, temperature=0, stream=True
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in together.choices]


@pytest.mark.parametrize(
    ("keys", "kind", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"temperature": 11}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 2, "extra_body": {"min_tokens": 3}}, openai.BadRequestError, "min_tokens"),
        ({"logit_bias": {"99999": 1}}, openai.BadRequestError, "logit_bias"),
        (
            {"extra_body": {"bad_words": [chr(i) for i in range(65, 98)]}},
            openai.BadRequestError,
            "bad_words",
        ),
        ({"stream": True, "messages": [*STORY * 4000]}, openai.BadRequestError, None),
    ],
)
def test_errors_are_openais(
    client: openai.OpenAI, keys: dict[str, Any], kind: type[openai.APIStatusError], param: Any
) -> None:
    with pytest.raises(kind) as raised:
        client.chat.completions.create(**{"model": "demo", "messages": STORY, **keys})
    assert raised.value.type is not None
    if param is not None:
        assert raised.value.param == param


def test_many_streams_at_once(server: Server) -> None:
    async def one(client: openai.AsyncOpenAI, seed: int, stream: bool) -> str:
        asked: dict[str, Any] = {
            "model": "demo",
            "messages": STORY,
            "seed": seed,
            "max_tokens": 24,
            "extra_body": NO_THINKING,
        }
        if not stream:
            answer = await client.chat.completions.create(**asked)
            return answer.choices[0].message.content or ""
        chunks = await client.chat.completions.create(**asked, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def all_of_them() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            texts = await asyncio.gather(
                *(one(client, seed, stream) for stream in (False, True) for seed in range(20))
            )
        assert texts[:20] == texts[20:]

    asyncio.run(all_of_them())
