"""The clients and the command against a running pipeline on the demo checkpoint."""

from __future__ import annotations

import asyncio

from click.testing import CliRunner

from benchmarks.support.pipeline import Pipeline
from nanovllm import LLM, AsyncClient, Client, SamplingParams
from nanovllm.client.cli import main
from nanovllm.client.control import Control
from nanovllm.client.status import render

SEEDED = SamplingParams(temperature=0.8, max_tokens=60, ignore_eos=True, seed=11, logprobs=1)


def test_a_stream_that_is_disconnected_again_and_again_is_whole(pipeline: Pipeline) -> None:
    with Client(pipeline.endpoint) as client:
        whole = client.generate("Once upon a time", SEEDED)
        stream = client.generate("Once upon a time", SEEDED, stream=True)
        deltas = []
        for number, delta in enumerate(stream):
            deltas.append(delta)
            if number % 10 == 3:
                client._thread._call(client._thread.connection.core.disconnected)
        assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
        assert "".join(delta.text for delta in deltas) == whole.text
        again = stream.result()
        assert again.finish_reason == whole.finish_reason == "length"
        assert again.usage.completion_tokens == 60
        assert again.logprobs is not None
        assert [entry[0][0] for entry in again.logprobs] == whole.token_ids


def test_a_disconnection_leaves_nothing_behind(pipeline: Pipeline) -> None:
    with Client(pipeline.endpoint) as client:
        stream = client.generate("x", SamplingParams(max_tokens=4000, ignore_eos=True), stream=True)
        next(stream)
    with Client(pipeline.endpoint) as client:
        assert client.generate("y", SamplingParams(max_tokens=1)).usage.completion_tokens == 1
    with Control(str(pipeline.runtime_dir)) as control:
        for _ in range(60):
            before, now = control.two_reports()
            if "0 running, 0 waiting, 0 records" in render(before, now):
                return
    raise AssertionError(render(before, now))


def test_every_way_in_gives_the_same_output(pipeline: Pipeline) -> None:
    async def streams() -> list[str]:
        async with AsyncClient(pipeline.endpoint) as client:

            async def one() -> str:
                stream = client.generate("A fox", greedy, stream=True)
                return "".join([delta.text async for delta in stream])

            return await asyncio.gather(*(one() for _ in range(8)))

    greedy = SamplingParams(temperature=0.0, max_tokens=24)
    with LLM(endpoint=pipeline.endpoint) as llm:
        texts = [output["text"] for output in llm.generate(["A fox"] * 3, greedy, use_tqdm=False)]
    texts += asyncio.run(streams())
    arguments = ["generate", "A fox", "--endpoint", pipeline.endpoint, "--temperature", "0"]
    printed = CliRunner().invoke(main, [*arguments, "--max-tokens", "24"])
    texts.append(printed.output.removesuffix("\n"))
    assert texts[0]
    assert texts == texts[:1] * 12


def test_a_chat_with_the_demo_model_says_what_to_expect(pipeline: Pipeline) -> None:
    ran = CliRunner().invoke(main, ["chat", "--runtime-dir", str(pipeline.runtime_dir)], input="")
    assert "The demo model is tiny" in ran.output
