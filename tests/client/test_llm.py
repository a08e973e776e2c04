"""LLM at a running pipeline, here a double of the ingress; and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from typing import Any, get_type_hints

import numpy as np
import pytest

from benchmarks.support.pipeline import Pipeline
from nanovllm import LLM, Client, PipelineUnavailable, RequestError, SamplingParams
from nanovllm.llm import WINDOW
from nanovllm.llm_options import LLMOptions
from nanovllm.protocol import Abort, Error, Generate
from nanovllm.settings import Settings
from tests.client.double import (
    SEED,
    Answer,
    HangUp,
    answer_in_full,
    answer_ping,
    finish,
    ingress,
    text_of,
)
from tests.terminal import BAR_IS_DRAWN, shown


def test_outputs_come_in_the_order_of_the_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    held: list[tuple[Generate, str]] = []

    def backwards(message: Any, session: str) -> Iterator[Answer]:
        held.append((message, session))
        if len(held) == 3:
            for request, its_session in reversed(held):
                yield from answer_in_full(request, its_session)

    with ingress(backwards) as double, LLM(endpoint=double.endpoint) as llm:
        params = [SamplingParams(0.6, 1), SamplingParams(0.6, 2), SamplingParams(0.6, 3)]
        outputs = llm.generate(["a", [7, 7], "ccc"], params)
        for output, ids in zip(outputs, ([1], [2, 3], [3, 4, 5]), strict=True):
            assert (output["text"], output["token_ids"]) == (text_of(ids), ids)
        assert [message.stream for message, _ in held] == [False] * 3
        assert "tokens/s" in capsys.readouterr().err


def test_the_bar_moves_while_no_request_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in BAR_IS_DRAWN.items():
        monkeypatch.setenv(name, value)
    held: list[tuple[Generate, str]] = []
    pings: list[Any] = []

    def hold(message: Any, session: str) -> Iterator[Answer]:
        held.append((message, session))
        yield from ()

    def let_go_at_the_third(message: Any, session: str) -> Iterator[Answer]:
        pings.append(message)
        yield from answer_ping(message, session)
        if held and len(pings) > 3:
            yield from answer_in_full(*held.pop())

    with ingress(hold, let_go_at_the_third) as double, LLM(endpoint=double.endpoint) as llm:
        llm.generate("a", SamplingParams(max_tokens=3))
    frames = shown(capsys.readouterr().err).split("\r")
    before = [frame for frame in frames if "0/1 prompts, 0 tokens" in frame]
    assert len({frame.split()[-1] for frame in before}) >= 2, "its clock has moved"
    assert "1/1 prompts, 3 tokens, " in frames[-1]


def test_one_text_one_params_and_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with ingress(answer_in_full) as double, LLM(endpoint=double.endpoint) as llm:
        (output,) = llm.generate("hello", SamplingParams(max_tokens=2, logprobs=0), use_tqdm=False)
        assert output["token_ids"] == [5, 6]
        assert output["logprobs"] == [[(5, -0.5)], [(6, -0.5)]]
        assert llm.generate([], use_tqdm=False) == []
        assert capsys.readouterr().err == ""


def test_thousands_of_prompts_pass_through_a_bounded_window() -> None:
    count = WINDOW + 1500
    unanswered: list[tuple[Generate, str]] = []
    outstanding: list[int] = []

    def script(message: Any, session: str) -> Iterator[Answer]:
        unanswered.append((message, session))
        outstanding.append(len(unanswered))
        if len(unanswered) == WINDOW or len(outstanding) == count:
            while unanswered:
                yield from answer_in_full(*unanswered.pop())

    with ingress(script) as double, LLM(endpoint=double.endpoint) as llm:
        prompts = [[1] * (1 + number % 5) for number in range(count)]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
        assert [output["token_ids"] for output in outputs] == [[len(p)] for p in prompts]
        assert max(outstanding) == WINDOW


def test_an_overloaded_pipeline_is_waited_for() -> None:
    refusals = [None] * 5

    def script(message: Any, session: str) -> Iterator[Answer]:
        if refusals:
            refusals.pop()
            yield Error(id=message.id, code="overloaded", message="try later")
        else:
            yield from answer_in_full(message, session)

    with ingress(script) as double, LLM(endpoint=double.endpoint) as llm:
        outputs = llm.generate(["a"] * 8, SamplingParams(max_tokens=1), use_tqdm=False)
        assert [output["token_ids"] for output in outputs] == [[1]] * 8


def test_a_dead_ingress_costs_nothing_but_time() -> None:
    deaths = [HangUp(), HangUp()]

    def script(message: Any, session: str) -> Iterator[Answer]:
        if message.prompt == "ccc" and deaths:
            yield deaths.pop()
        yield from answer_in_full(message, session)

    with ingress(script) as double, LLM(endpoint=double.endpoint) as llm:
        outputs = llm.generate(["a", "bb", "ccc", "dddd"], SamplingParams(max_tokens=1))
        assert [output["token_ids"] for output in outputs] == [[1], [2], [3], [4]]


def test_a_refused_prompt_is_named_and_the_others_are_aborted() -> None:
    def script(message: Any, session: str) -> Iterator[Answer]:
        if isinstance(message, Abort):
            yield finish(message, "abort")
        elif message.prompt == "bad":
            yield Error(id=message.id, code="context_length_exceeded", message="too long")

    with ingress(script) as double, LLM(endpoint=double.endpoint) as llm:
        with pytest.raises(RequestError, match=r"prompts\[2\]: too long") as caught:
            llm.generate(["a", "b", "bad", "c"], use_tqdm=False)
        assert caught.value.code == "context_length_exceeded"
        double.wait_for(lambda received: sum(isinstance(m, Abort) for m in received) == 3)


def test_an_output_is_a_dict_that_tells_how_it_ended_and_goes_into_json() -> None:
    with ingress(answer_in_full) as double, LLM(endpoint=double.endpoint) as llm:
        params = SamplingParams(max_tokens=2, logprobs=0)
        (output,) = llm.generate(["hello"], params, use_tqdm=False)
        assert json.loads(json.dumps(output)) == {
            "text": "<5><6>",
            "token_ids": [5, 6],
            "finish_reason": "length",
            "usage": {
                "prompt_tokens": 1,
                "completion_tokens": 2,
                "cached_tokens": 0,
            },
            "seed": SEED,
            "logprobs": [[[5, -0.5]], [[6, -0.5]]],
        }
        with Client(double.endpoint) as client:
            completion = dataclasses.asdict(client.generate("hello", params))
        del completion["usage"]["timings"]  # not asked for
        assert output == {key: completion[key] for key in output}


def test_a_refused_prompt_may_stand_as_an_error_among_the_others() -> None:
    def script(message: Any, session: str) -> Iterator[Answer]:
        if message.prompt == "bad":
            yield Error(id=message.id, code="context_length_exceeded", message="too long")
        else:
            yield from answer_in_full(message, session)

    with ingress(script) as double, LLM(endpoint=double.endpoint) as llm:
        params = SamplingParams(max_tokens=1)
        prompts = ["a", "bad", "ccc", "bad"]
        first, second, third, fourth = llm.generate(prompts, params, return_errors=True)
        assert isinstance(first, dict)
        assert isinstance(third, dict)
        assert (first["token_ids"], third["token_ids"]) == ([1], [3])
        for index, error in ((1, second), (3, fourth)):
            assert isinstance(error, RequestError)
            assert error.code == "context_length_exceeded"
            assert error.message == f"prompts[{index}]: too long"


def test_an_error_of_all_prompts_is_raised() -> None:
    def script(message: Any, session: str) -> Iterator[Answer]:
        threading.Thread(target=llm.exit).start()
        yield from ()

    with ingress(script) as double:
        llm = LLM(endpoint=double.endpoint)
        with pytest.raises(RuntimeError, match="closed"):
            llm.generate("a", return_errors=True, use_tqdm=False)


def test_invalid_arguments_are_named_before_anything_is_sent() -> None:
    with ingress(answer_in_full) as double, LLM(endpoint=double.endpoint) as llm:
        with pytest.raises(ValueError, match="2 prompts but 1 sampling_params"):
            llm.generate(["a", "b"], [SamplingParams()])
        with pytest.raises(ValueError, match=r"prompts\[1\]: .*empty"):
            llm.generate(["a", ""])
        with pytest.raises(ValueError, match=r"^1 prompt but 2 sampling_params"):
            llm.generate("a", [SamplingParams()] * 2)
        with pytest.raises(TypeError, match=r"prompts\[0\]: .*float$"):
            llm.generate([[0.5]])  # type: ignore[list-item]
        with pytest.raises(ValueError, match=r"prompts\[1\]: .*not valid Unicode"):
            llm.generate(["a", "caf\udce9"])
        assert double.generates == []


def test_arguments_of_another_type_are_named() -> None:
    no_prompts: list[Any] = [None, 5, b"text", {"role": "user", "content": "hi"}]
    no_params: list[Any] = [{"temperature": 1}, "xyz", [0.5]]
    prompts: list[Any] = [[1, 2, 3], np.array([1, 2]), [{"role": "user", "content": "hi"}]]
    with ingress(answer_in_full) as double, LLM(endpoint=double.endpoint) as llm:
        for wrong in no_prompts:
            with pytest.raises(TypeError, match=rf"list of prompts.* {type(wrong).__name__}$"):
                llm.generate(wrong)
        for wrong in no_params:
            with pytest.raises(TypeError, match=r"SamplingParams, not (dict|str|float)$"):
                llm.generate("a", wrong)
        for prompt in prompts:
            with pytest.raises(TypeError, match=r"prompts\[0\]: .*goes into a list"):
                llm.generate(prompt)
            llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False)


def test_options_are_checked_before_anything_is_launched() -> None:
    with pytest.raises(TypeError, match=r"'max_model_length'; did you mean max_model_len\?$"):
        LLM("", max_model_length=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"'swap_space'; there are attention, .*max_num_seqs"):
        LLM("", swap_space=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="'runtime_dir'"):
        LLM("", runtime_dir="x")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="tensor_parallel_size"):
        LLM("", tensor_parallel_size=0)
    for dtype in ("fp16", 16, None):
        with pytest.raises(ValueError, match=r"^dtype=.*: one of auto, float32, b.*16, float16$"):
            LLM(dtype=dtype)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^--max-num-batched-tokens \(10\)"):
        LLM("", max_num_seqs=100, max_num_batched_tokens=10)
    with pytest.raises(TypeError, match="dtype"):
        LLM(endpoint="tcp://127.0.0.1:1", dtype="float32")


def test_the_options_for_editors_are_those_of_the_settings() -> None:
    settings = get_type_hints(Settings)
    of_http = "http http_servers tls_certificate tls_key cors served_model_name"
    of_http += " api_key_file admin_key_file"
    of_joining = "join advertise"
    names = ("model", "runtime_dir", "generation_config", *of_http.split(), *of_joining.split())
    for name in names:
        del settings[name]  # an LLM's own pipeline has no HTTP servers, and joins no other
    assert get_type_hints(LLMOptions) == settings


def test_nobody_at_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm.llm.CONNECT_TIMEOUT_S", 0.4)
    with pytest.raises(PipelineUnavailable, match="nanovllm-launch"):
        LLM(endpoint="tcp://127.0.0.1:1")


def test_a_closed_llm_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with ingress(answer_in_full) as double:
        llm = LLM(endpoint=double.endpoint)
        llm.exit()
        llm.exit()
        with pytest.raises(RuntimeError, match="the LLM is closed"):
            llm.generate("a")
        assert capsys.readouterr().err == ""


def test_an_invalid_prompt_may_stand_as_an_error_too(pipeline: Pipeline) -> None:
    with LLM(endpoint=pipeline.endpoint) as llm:
        params = SamplingParams(temperature=0, max_tokens=3)
        first, empty, last = llm.generate(["a", "", "b"], params, False, return_errors=True)
    assert isinstance(empty, RequestError)
    assert str(empty) == "invalid_request: prompts[1]: the prompt is empty"
    assert not isinstance(first, RequestError)
    assert not isinstance(last, RequestError)


def test_n_outputs_are_those_of_n_requests(pipeline: Pipeline) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=6, seed=5, n=3)
    with LLM(endpoint=pipeline.endpoint) as llm:
        outputs = llm.generate(["Once", "Twice"], params, use_tqdm=False)
        singles = [
            llm.generate([prompt], SamplingParams(1.0, 6, seed=seed), use_tqdm=False)[0]
            for prompt in ("Once", "Twice")
            for seed in (5, 6, 7)
        ]
        with pytest.raises(RequestError, match=r"prompts\[1\]"):
            llm.generate(["Once", [10**6]], params, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == [one["token_ids"] for one in singles]
    assert [output["seed"] for output in outputs] == [5, 6, 7] * 2
    greedy = SamplingParams(temperature=0, max_tokens=1, seed=2**63 - 1, n=2)
    with LLM(endpoint=pipeline.endpoint) as llm:
        ends = llm.generate(["Once"], greedy, use_tqdm=False)
    assert [output["seed"] for output in ends] == [2**63 - 1, -(2**63)]
    with pytest.raises(ValueError, match="n=0"):
        SamplingParams(n=0)


def test_chat_takes_one_chat_or_many() -> None:
    said = {"role": "user", "content": "hello"}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    params = SamplingParams(temperature=0, max_tokens=4)
    with LLM(device="cpu") as llm:
        (one,) = llm.chat([said], params, use_tqdm=False)
        two = llm.chat([[said], [said]], params, use_tqdm=False)
        texts = llm.chat(["hello", "hello"], params, use_tqdm=False) + llm.chat("hello", params)
        (by_generate,) = llm.generate([[said]], params, use_tqdm=False)
        llm.chat([said], params, False, tools=tools, chat_template_kwargs={"enable_thinking": True})
        tokenizer = llm.get_tokenizer()
    assert [output["token_ids"] for output in (*two, *texts, by_generate)] == [one["token_ids"]] * 6
    assert tokenizer.decode(one["token_ids"], skip_special_tokens=True) == one["text"]


def test_a_running_pipeline_s_tokenizer_is_not_known(pipeline: Pipeline) -> None:
    with LLM(endpoint=pipeline.endpoint) as llm, pytest.raises(RuntimeError, match="load it"):
        llm.get_tokenizer()
