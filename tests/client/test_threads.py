"""Clients used by several threads, across a fork, and at the end of a program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from nanovllm import LLM, Client, SamplingParams
from nanovllm.client.core import ClientCore
from nanovllm.protocol import Abort, Generate
from tests.client.double import (
    TIMEOUT_S,
    Answer,
    HangUp,
    answer_in_full,
    ingress,
    text_of,
    whole_answer,
)
from tests.client.test_client import some_then_silence


def test_one_client_serves_many_threads_over_one_socket() -> None:
    sessions: set[str] = set()

    def script(message: Any, session: str) -> Iterator[Answer]:
        sessions.add(session)
        yield from answer_in_full(message, session)

    def one(number: int) -> None:
        params = SamplingParams(max_tokens=9)
        expected = list(range(number, number + 9))
        assert client.generate([1] * number, params).token_ids == expected
        stream = client.generate([1] * number, params, stream=True)
        assert [token for delta in stream for token in delta.token_ids] == expected
        assert client.ping().ready

    with ingress(script) as double, Client(double.endpoint) as client:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(one, range(1, 101)))
        assert len(sessions) == 1


def test_streams_of_many_threads_survive_deaths_of_the_ingress() -> None:
    deaths = [120, 60, 10]
    answered = 0

    def script(message: Any, session: str) -> Iterator[Answer]:
        nonlocal answered
        for answer in whole_answer(message, session):
            yield answer
            answered += 1
            if deaths and answered >= deaths[-1]:
                deaths.pop()
                yield HangUp()

    def one(number: int) -> None:
        stream = client.generate([1] * number, SamplingParams(max_tokens=9), stream=True)
        tokens = [token for delta in stream for token in delta.token_ids]
        assert tokens == list(range(number, number + 9))
        assert stream.result().text == text_of(tokens)

    with ingress(script) as double, Client(double.endpoint) as client:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(one, range(1, 51)))
        assert not deaths


def test_one_llm_serves_many_threads() -> None:
    def one(number: int) -> list[list[int]]:
        prompts = [[1] * (number + i) for i in range(5)]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=2), use_tqdm=False)
        return [output["token_ids"] for output in outputs]

    with (
        ingress(answer_in_full) as double,
        LLM(endpoint=double.endpoint) as llm,
        ThreadPoolExecutor(8) as threads,
    ):
        for number, outputs in enumerate(threads.map(one, range(1, 41)), 1):
            assert outputs == [[number + i, number + i + 1] for i in range(5)]


def test_two_threads_may_wait_for_one_stream() -> None:
    with (
        ingress(answer_in_full) as double,
        Client(double.endpoint) as client,
        ThreadPoolExecutor(1) as threads,
    ):
        for _ in range(20):
            stream = client.generate("x", SamplingParams(max_tokens=99), stream=True)
            whole = threads.submit(stream.result)
            tokens = [token for delta in stream for token in delta.token_ids]
            assert whole.result(TIMEOUT_S).token_ids == tokens == list(range(1, 100))


def test_closing_the_client_tells_the_threads_that_wait() -> None:
    with ingress(some_then_silence) as double, ThreadPoolExecutor(3) as threads:
        client = Client(double.endpoint)
        streams = [client.generate("x", stream=True) for _ in range(3)]
        for stream in streams:
            next(stream)
        waiting = [threads.submit(stream.result) for stream in streams]
        client.close()
        for future in waiting:
            with pytest.raises(RuntimeError, match="the client is closed"):
                future.result(TIMEOUT_S)


def test_a_stream_keeps_its_client() -> None:
    with ingress(answer_in_full) as double:
        stream = Client(double.endpoint).generate("x", SamplingParams(max_tokens=9), stream=True)
        assert len(list(stream)) == 5


def test_a_connection_that_fails_ends_the_calls_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ClientCore, now: float) -> bool:
        raise OSError("too many open files")

    with ingress(some_then_silence) as double, Client(double.endpoint) as client:
        stream = client.generate("x", stream=True)
        next(stream)
        monkeypatch.setattr(ClientCore, "advance", fail)
        with pytest.raises(RuntimeError, match="too many open files"):
            stream.result()
        with pytest.raises(RuntimeError, match="closed"):
            client.generate("y")


def test_ctrl_c_in_an_llm_aborts_its_call_and_the_next_one_works() -> None:
    def silent_until_an_abort(message: Any, session: str) -> Iterator[Answer]:
        if isinstance(message, Abort):
            aborted.append(message)
        elif aborted:
            yield from answer_in_full(message, session)
        elif len(double.generates) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    aborted: list[Abort] = []
    with ingress(silent_until_an_abort) as double, LLM(endpoint=double.endpoint) as llm:
        with pytest.raises(KeyboardInterrupt) as caught:
            llm.generate(["a"] * 4, use_tqdm=False)
        files = [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert not [file for file in files if "zmq" in file]
        double.wait_for(lambda received: sum(isinstance(m, Abort) for m in received) == 4)
        (output,) = llm.generate("a", SamplingParams(max_tokens=2), use_tqdm=False)
        assert output["token_ids"] == [1, 2]


INTERRUPTED = """
import sys
from nanovllm import Client, SamplingParams

def interrupted(use, at):
    # Whether Ctrl-C comes, at the end of the function that is the at-th to end in this thread.
    ends = 0

    def trace(frame, event, _):
        nonlocal ends
        ends += event == "return"
        if event == "return" and ends == at:
            raise KeyboardInterrupt
        return trace

    try:
        sys.settrace(trace)
        use()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return ends >= at

client, params = Client(sys.argv[1]), SamplingParams(max_tokens=2)
for use in (client.ping, lambda: client.generate("x", params)):
    at = 1
    while interrupted(use, at):
        client.ping()
        at += 1
    assert at > 9
print(client.generate("hello", params).token_ids)
"""


def test_ctrl_c_at_any_moment_leaves_a_client_that_works() -> None:
    with ingress(answer_in_full) as double:
        ran = subprocess.run(
            [sys.executable, "-c", INTERRUPTED, double.endpoint],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert (ran.returncode, ran.stdout) == (0, "[5, 6]\n"), ran.stderr


@pytest.mark.parametrize("last", ["", "sys.exit(0)", "del stream, client", "client.close()"])
def test_a_program_ends_though_its_client_is_busy(last: str) -> None:
    program = f"""
import sys, threading
from nanovllm import Client
client = Client(sys.argv[1])
stream = client.generate("x", stream=True)
print(next(stream).text)
threading.Thread(target=client.generate, args=["y"], daemon=True).start()
{last}
"""
    with ingress(some_then_silence) as double:
        ran = subprocess.run(
            [sys.executable, "-c", program, double.endpoint],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert (ran.returncode, ran.stdout) == (0, "a\n")
        assert "Fatal" not in ran.stderr


FORK = """
import os, sys
from nanovllm import Client, LLM, SamplingParams

def attempt(use):
    try:
        use()
    except RuntimeError as error:
        print("error:", error, flush=True)

params = SamplingParams(max_tokens=2)
client, llm = Client(sys.argv[1]), LLM(endpoint=sys.argv[1])
stream = client.generate("parent", stream=True)
next(stream)
if os.fork() == 0:
    attempt(lambda: client.generate("x"))
    attempt(client.ping)
    attempt(lambda: llm.generate("x", use_tqdm=False))
    del stream
    client.close()
    with Client(sys.argv[1]) as own:
        print(own.generate("hello", params).token_ids, flush=True)
    sys.exit(0)
assert os.wait()[1] == 0
print(client.generate("hello", params).token_ids, flush=True)
print(llm.generate("hello", params, use_tqdm=False)[0]["token_ids"], flush=True)
"""


def test_a_fork_is_told_to_make_a_client_of_its_own() -> None:
    def script(message: Any, session: str) -> Iterator[Answer]:
        if isinstance(message, Generate) and message.prompt == "parent":
            yield from some_then_silence(message, session)
        else:
            yield from answer_in_full(message, session)

    with ingress(script) as double:
        ran = subprocess.run(
            [sys.executable, "-c", FORK, double.endpoint],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert ran.returncode == 0, ran.stderr
        *errors, in_the_fork, in_the_parent, by_the_llm = ran.stdout.splitlines()
        assert len(errors) == 3
        assert all("forked" in error and "make a new one" in error for error in errors)
        assert in_the_fork == in_the_parent == by_the_llm == "[5, 6]"
        aborts = [message for message in double.received if isinstance(message, Abort)]
        assert len(aborts) <= 1, "the fork aborts nothing"


def test_a_fork_of_multiprocessing_is_told_so_too() -> None:
    program = """
import multiprocessing, sys
from nanovllm import Client

def use():
    client.generate("x")

client = Client(sys.argv[1])
child = multiprocessing.get_context("fork").Process(target=use)
child.start()
child.join()
assert child.exitcode == 1
assert client.ping().ready
"""
    with ingress(answer_in_full) as double:
        ran = subprocess.run(
            [sys.executable, "-c", program, double.endpoint],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert ran.returncode == 0, ran.stderr
        assert "RuntimeError: made in process" in ran.stderr


def test_no_thread_is_left_behind() -> None:
    before = threading.active_count()
    with ingress(answer_in_full) as double:
        for _ in range(3):
            with Client(double.endpoint) as client:
                client.ping()
            Client(double.endpoint).ping()  # dropped
        for _ in range(3):
            with pytest.raises(ValueError):
                Client("no endpoint")
        assert threading.active_count() == before + 1, "the double's"
