"""The synchronous client over real sockets, against a double of the ingress."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import Client, PipelineUnavailable, RequestError, SamplingParams
from nanovllm.protocol import Abort, Accepted, Delta, Error, Generate
from tests.client.double import (
    SEED,
    Answer,
    HangUp,
    answer_in_full,
    answer_ping,
    ingress,
    output_of,
    say_nothing,
    text_of,
    whole_answer,
)


def some_then_silence(message: Any, session: str) -> Iterator[Answer]:
    if isinstance(message, Generate) and not message.resume_token_ids:
        yield Accepted(id=message.id, session=session, seed=SEED)
        yield Delta(id=message.id, offset=0, token_ids=[1], text="a")


def has_abort(received: list[Any]) -> bool:
    return any(isinstance(message, Abort) for message in received)


def test_generate_returns_the_completion() -> None:
    with ingress(answer_in_full) as double, Client(double.endpoint) as client:
        params = SamplingParams(max_tokens=3, logprobs=0)
        completion = client.generate("hello", params)
        (sent,) = double.generates
        assert completion.token_ids == output_of(sent) == [5, 6, 7]
        assert completion.text == "<5><6><7>"
        assert completion.finish_reason == "length"
        assert completion.seed == SEED
        assert json.loads(json.dumps(dataclasses.asdict(completion))) == {
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": "length",
            "usage": {
                "prompt_tokens": 1,
                "completion_tokens": 2,
                "cached_tokens": 0,
                "timings": None,
            },
            "logprobs": [[[5, -0.5]], [[6, -0.5]], [[7, -0.5]]],
            "seed": SEED,
            "answer_at": None,
            "prompt_logprobs": None,
        }
        assert not sent.stream


def test_stream_gives_deltas_and_then_the_whole() -> None:
    with ingress(answer_in_full) as double, Client(double.endpoint) as client:
        stream = client.generate([9, 9], SamplingParams(max_tokens=5), stream=True)
        assert [delta.token_ids for delta in stream] == [[2, 3], [4, 5], [6]]
        assert stream.result().text == text_of([2, 3, 4, 5, 6])


def test_chat_takes_a_string_or_messages() -> None:
    with ingress(answer_in_full) as double, Client(double.endpoint) as client:
        client.chat("hi", chat_template_kwargs={"enable_thinking": False})
        client.chat([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
        first, second = double.generates
        assert first.messages is not None
        assert second.messages is not None
        assert [m["role"] for m in first.messages] == ["user"]
        assert [m["role"] for m in second.messages] == ["system", "user"]
        assert first.chat_template_kwargs == {"enable_thinking": False}


def test_two_streams_at_once() -> None:
    with ingress(answer_in_full) as double, Client(double.endpoint) as client:
        params = SamplingParams(max_tokens=6)
        one, two = (client.generate(prompt, params, stream=True) for prompt in ("a", "bb"))
        pairs = [
            (first.token_ids, second.token_ids) for first, second in zip(one, two, strict=True)
        ]
        assert pairs == [([1, 2], [2, 3]), ([3, 4], [4, 5]), ([5, 6], [6, 7])]


def test_a_stream_survives_the_death_of_the_ingress() -> None:
    deaths = [3, 5, 1]

    def script(message: Any, session: str) -> Iterator[Answer]:
        answers = list(whole_answer(message, session))
        if deaths:
            yield from answers[: deaths.pop()]
            yield HangUp()
        yield from answers

    with ingress(script) as double, Client(double.endpoint) as client:
        params = SamplingParams(max_tokens=20)
        stream = client.generate("hello", params, stream=True)
        tokens = [token for delta in stream for token in delta.token_ids]
        assert tokens == list(range(5, 25))
        assert stream.result().text == text_of(tokens)
        resumed = [message.resume_token_ids for message in double.generates]
        assert resumed == [[], [], tokens[:8], tokens[:12]]


def test_a_request_without_stream_survives_it_too() -> None:
    deaths = [HangUp()]

    def script(message: Any, session: str) -> Iterator[Answer]:
        if deaths:
            yield deaths.pop()
        yield from whole_answer(message, session)

    with ingress(script) as double, Client(double.endpoint) as client:
        assert client.generate("hello", SamplingParams(max_tokens=2)).token_ids == [5, 6]
        assert len(double.generates) == 2


def test_an_ingress_reborn_between_requests_is_no_error() -> None:
    def script(message: Any, session: str) -> Iterator[Answer]:
        yield from whole_answer(message, session)
        if message.prompt == "bye":
            yield HangUp()

    with ingress(script) as double, Client(double.endpoint) as client:
        for prompt in ("bye", "bye", "hello"):
            assert client.generate(prompt, SamplingParams(max_tokens=1)).finish_reason == "length"


@pytest.mark.parametrize("how", ["close", "with", "drop", "interrupt"])
def test_leaving_a_stream_early_aborts_it(how: str) -> None:
    with ingress(some_then_silence) as double, Client(double.endpoint) as client:
        stream = client.generate("hello", stream=True)
        if how == "interrupt":

            def be_interrupted() -> None:
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
                stream.result()

            with pytest.raises(KeyboardInterrupt):
                be_interrupted()
        elif how == "with":
            with stream:
                assert next(stream).text == "a"
        else:
            assert next(stream).text == "a"
            if how == "close":
                stream.close()
            else:
                del stream
                gc.collect()
        double.wait_for(has_abort)
        assert client.ping().model == "double", "the client goes on"


def test_a_closed_stream_says_so() -> None:
    with ingress(some_then_silence) as double, Client(double.endpoint) as client:
        stream = client.generate("hello", stream=True)
        assert next(stream).text == "a"
        stream.close()
        with pytest.raises(RuntimeError, match="closed"):
            next(stream)


def test_an_error_has_its_code_and_message() -> None:
    def script(message: Any, session: str) -> Iterator[Answer]:
        yield Error(id=message.id, code="context_length_exceeded", message="5000 > 4096")

    with ingress(script) as double, Client(double.endpoint) as client:
        with pytest.raises(RequestError, match="5000 > 4096") as caught:
            client.generate("long")
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(RequestError):
            next(client.generate("long", stream=True))


def test_an_error_in_mid_stream_comes_after_what_arrived() -> None:
    def script(message: Any, session: str) -> Iterator[Answer]:
        yield from some_then_silence(message, session)
        yield Error(id=message.id, code="internal", message="broken")

    with ingress(script) as double, Client(double.endpoint) as client:
        stream = client.generate("x", stream=True)
        assert next(stream).text == "a"
        with pytest.raises(RequestError, match="internal: broken"):
            next(stream)


@pytest.mark.parametrize("where", ["no port", "no file", "a stale file"])
def test_where_nothing_listens_a_client_does_not_wait_for_its_timeout(
    where: str, tmp_path: Path
) -> None:
    """Its timeout is longer than a test may take."""
    stale = socket.socket(socket.AF_UNIX)
    with stale:
        stale.bind(str(tmp_path / "stale"))
    endpoint = {
        "no port": "tcp://127.0.0.1:1",
        "no file": f"ipc://{tmp_path}/none",
        "a stale file": f"ipc://{tmp_path}/stale",
    }[where]
    with Client(endpoint, timeout=600.0) as client:
        with pytest.raises(PipelineUnavailable, match=f"{endpoint} .*nanovllm-launch"):
            client.generate("hello")
        with pytest.raises(PipelineUnavailable, match="nothing listens there"):
            client.ping()


def test_a_client_may_be_used_a_moment_before_its_pipeline_listens() -> None:
    with ingress(answer_in_full) as earlier:
        pass
    # The first attempt to connect is refused, and the connection is kept.
    with Client(earlier.endpoint, timeout=600.0) as client:
        stream = client.generate("hello", SamplingParams(max_tokens=2), stream=True)
        with ingress(answer_in_full, endpoint=earlier.endpoint):
            assert stream.result().token_ids == [5, 6]


def test_a_timeout_that_is_shorter_holds() -> None:
    with (
        ingress(some_then_silence, on_ping=say_nothing) as double,
        Client(double.endpoint, timeout=0.4) as client,
        pytest.raises(PipelineUnavailable, match=r"waited 0\.4 s"),
    ):
        client.ping()


def test_an_ingress_that_falls_silent_is_given_up() -> None:
    with (
        ingress(some_then_silence, on_ping=say_nothing) as double,
        Client(double.endpoint, timeout=3.0) as client,
    ):
        stream = client.generate("hello", stream=True)
        assert next(stream).text == "a"
        with pytest.raises(PipelineUnavailable, match="is gone"):
            list(stream)
        assert len(double.generates) > 1, "it tried again before"


def test_an_answer_may_take_longer_than_the_timeout_while_pings_are_answered() -> None:
    asked: list[Generate] = []
    pings: list[Any] = []

    def hold(message: Any, session: str) -> Iterator[Answer]:
        asked.append(message)
        yield from ()

    def answer_at_the_third_ping(ping: Any, session: str) -> Iterator[Answer]:
        yield from answer_ping(ping, session)
        pings.append(ping)
        if len(pings) == 3:
            yield from whole_answer(asked[0], session)

    with (
        ingress(hold, answer_at_the_third_ping) as double,
        Client(double.endpoint, timeout=3.0) as client,
    ):
        assert client.generate("x", SamplingParams(max_tokens=1)).token_ids == [1]
        assert len(asked) == 1


@pytest.mark.parametrize("endpoint", ["localhost:5555", "http://x", "", "tcp://"])
def test_a_wrong_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(ValueError, match="tcp://HOST:PORT"):
        Client(endpoint)


def test_a_closed_client_says_so() -> None:
    client = Client("tcp://127.0.0.1:1")
    stream = client.generate("x", stream=True)
    client.close()
    client.close()
    for use in (client.ping, stream.result, lambda: client.generate("y")):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_invalid_arguments_are_refused_before_anything_is_sent() -> None:
    with Client("tcp://127.0.0.1:1") as client:
        with pytest.raises(ValueError, match="empty"):
            client.generate("")
        with pytest.raises(TypeError, match="float"):
            client.generate([1.0])  # type: ignore[arg-type]
