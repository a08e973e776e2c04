"""Prompts that come back: `echo`, and `prompt_logprobs`, before a running pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from benchmarks.support.pipeline import Pipeline
from nanovllm import Client, SamplingParams
from nanovllm.client.results import Completion
from tests.http.server import HELLO, Server

PROMPT = "Once upon a time \N{GRINNING FACE} there was"


@pytest.fixture(scope="module")
def raw(pipeline: Pipeline) -> Iterator[Client]:
    with Client(pipeline.endpoint) as client:
        yield client


def tokens_of(server: Server, text: str) -> list[int]:
    tokens: list[int] = server.post("/tokenize", {"prompt": text}).json["tokens"]
    return tokens


def near(logprobs: Iterable[float]) -> Any:
    """Logprobs of another batch differ in the last digits."""
    return pytest.approx([*logprobs], abs=1e-4)


def greedy(raw: Client, prompt: Any, count: int) -> Completion:
    params = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, logprobs=count, prompt_logprobs=count
    )
    return raw.generate(prompt, params)


def choices_of(server: Server, *, stream: bool, **asked: Any) -> list[Any]:
    """The choices of an answer; of a stream, with all chunks of a choice joined."""
    answer = server.complete(temperature=0, ignore_eos=True, stream=stream, **asked)
    assert answer.status == 200, answer.body
    if not stream:
        return list(answer.json["choices"])
    choices: dict[int, Any] = {}
    for chunk in answer.chunks:
        for piece in chunk["choices"]:
            if (choice := choices.setdefault(piece["index"], piece)) is piece:
                continue
            choice["text"] += piece["text"]
            choice["finish_reason"] = piece["finish_reason"]
            assert "prompt_logprobs" not in piece, "they come once"
            if piece["logprobs"] is not None:
                for key, values in piece["logprobs"].items():
                    choice["logprobs"][key] += values
    return [choices[index] for index in sorted(choices)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_echo_has_the_logprobs_of_the_prompt(
    server: Server, raw: Client, stream: bool, ids: bool
) -> None:
    token_ids = tokens_of(server, PROMPT)
    expected = greedy(raw, token_ids, 2)
    assert expected.prompt_logprobs is not None
    assert expected.logprobs is not None
    (choice,) = choices_of(
        server,
        stream=stream,
        prompt=token_ids if ids else PROMPT,
        echo=True,
        logprobs=2,
        max_tokens=8,
    )
    assert choice["text"] == PROMPT + expected.text
    assert choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    entries = [*filter(None, expected.prompt_logprobs), *expected.logprobs]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == near(entry[0][1] for entry in entries)
    assert logprobs["top_logprobs"][0] is None
    for top, entry in zip(logprobs["top_logprobs"][1:], entries, strict=True):
        assert sorted(top.values()) == near(sorted(logprob for _, logprob in entry[1:]))
    offsets = logprobs["text_offset"]
    for begin, token in zip(offsets, logprobs["tokens"], strict=True):
        assert token.startswith("bytes:") or choice["text"][begin:].startswith(token)
    assert offsets[len(token_ids)] == len(PROMPT)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_alone_gives_no_output(server: Server, raw: Client, stream: bool) -> None:
    prompts = [tokens_of(server, text) for text in (PROMPT, "The")]
    asked = {"prompt": prompts, "n": 2, "echo": True, "max_tokens": 0}
    choices = choices_of(server, stream=stream, logprobs=0, **asked)
    for index, prompt in enumerate(prompts):
        expected = greedy(raw, prompt, 0).prompt_logprobs
        assert expected is not None
        for choice in choices[2 * index : 2 * index + 2]:
            assert choice["text"] == (PROMPT, "The")[index]
            assert choice["finish_reason"] == "length"
            logprobs = choice["logprobs"]["token_logprobs"]
            assert logprobs[0] is None
            assert logprobs[1:] == near(entry[0][1] for entry in expected[1:] if entry)
    assert [c["text"] for c in choices_of(server, stream=stream, **asked)] == (
        [PROMPT, PROMPT, "The", "The"]
    )


def test_echo_counts_no_output_that_it_does_not_give(server: Server) -> None:
    asked: dict[str, Any] = {"prompt": "The fox", "echo": True, "max_tokens": 0}
    whole = server.complete(**asked).json
    stream = server.complete(**asked, stream=True, stream_options={"include_usage": True})
    assert whole["usage"]["completion_tokens"] == 0
    assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] == 2
    assert stream.chunks[-1]["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_logprobs_come_once_for_each_choice(
    server: Server, raw: Client, stream: bool
) -> None:
    expected = greedy(raw, PROMPT, 1)
    assert expected.prompt_logprobs is not None
    choices = choices_of(server, stream=stream, prompt=PROMPT, n=2, max_tokens=8, prompt_logprobs=1)
    names = {str(i): server.post("/detokenize", {"tokens": [i]}).json["prompt"] for i in range(270)}
    for choice in choices:
        assert choice["text"] == expected.text
        assert choice["logprobs"] is None
        entries = choice["prompt_logprobs"]
        assert entries[0] is None
        for entry, raw_entry in zip(entries[1:], expected.prompt_logprobs[1:], strict=True):
            assert raw_entry is not None
            found = {int(token): likely["logprob"] for token, likely in entry.items()}
            assert found == pytest.approx(dict(raw_entry), abs=1e-4)
            for token, likely in entry.items():
                assert names.get(token, likely["decoded_token"]) == likely["decoded_token"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_has_the_logprobs_of_its_prompt(server: Server, raw: Client, stream: bool) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0)
    expected = raw.chat(HELLO, params).prompt_logprobs
    assert expected is not None
    answer = server.chat(temperature=0, max_tokens=4, prompt_logprobs=0, stream=stream)
    chunks = answer.chunks if stream else [answer.json]
    found = [c["prompt_logprobs"] for x in chunks for c in x["choices"] if "prompt_logprobs" in c]
    (entries,) = found
    assert entries[0] is None
    assert [next(iter(entry.values()))["logprob"] for entry in entries[1:]] == (
        near(entry[0][1] for entry in expected[1:] if entry)
    )


@pytest.mark.parametrize(
    ("keys", "param"),
    [
        ({"prompt": [300, 10**6], "echo": True}, "prompt"),
        ({"prompt": [300] * 5000}, "prompt"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "echo": 1}, "echo"),
        ({"prompt": "x", "prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt": "x", "prompt_logprobs": True}, "prompt_logprobs"),
        ({"prompt": [[300] * 4000] * 2, "n": 64, "prompt_logprobs": 20}, "prompt_logprobs"),
    ],
)
def test_what_cannot_come_back_is_refused(server: Server, keys: Any, param: str) -> None:
    answer = server.complete(**keys)
    assert answer.status == 400
    assert answer.json["error"]["param"] == param
