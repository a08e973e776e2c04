"""What a person sees who generates or chats: real commands in a terminal, against a double of the
ingress."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm import Client, SamplingParams
from nanovllm.client.answers import ThinkingSplitter
from nanovllm.client.chat import Chat
from nanovllm.protocol import Abort, Accepted, Delta, Error, Generate
from tests.client.double import (
    SEED,
    TIMEOUT_S,
    Answer,
    IngressDouble,
    answer_in_full,
    finish,
    ingress,
)
from tests.client.test_client import has_abort, some_then_silence
from tests.terminal import ALT_ENTER, CTRL_C, CTRL_D, ENTER, UP, Terminal, terminal

NANOVLLM = (sys.executable, "-m", "nanovllm")
PROMPT = "\n>"


def written(message: Generate, session: str, *texts: str) -> Iterator[Answer]:
    """The beginning of an answer, a token a text."""
    yield Accepted(id=message.id, session=session, seed=SEED)
    for at, text in enumerate(texts):
        yield Delta(id=message.id, offset=at, token_ids=[7], text=text)


@contextmanager
def chat(double: IngressDouble, state: Path, *options: str) -> Iterator[Terminal]:
    command = (*NANOVLLM, "chat", "--endpoint", double.endpoint, *options)
    with terminal(command, XDG_STATE_HOME=str(state)) as shown:
        shown.wait_for(PROMPT)
        yield shown


def say(shown: Terminal, text: str) -> str:
    """What is shown after `text` was sent, until the next prompt."""
    shown.press(text + ENTER)
    return shown.wait_for(PROMPT)


def contents(message: Generate) -> list[str]:
    return [said["content"] for said in message.messages or []]


def test_a_paste_is_one_message_and_commands_change_the_chat(tmp_path: Path) -> None:
    with ingress(answer_in_full) as double, chat(double, tmp_path, "--max-tokens", "1") as shown:
        shown.paste("one\ntwo\n")
        say(shown, f"three{ALT_ENTER}four")
        assert contents(double.generates[-1]) == ["one\ntwo\nthree\nfour"]
        for command in ("/system", "/clear", "/exit"):
            assert command in say(shown, "/help")
        assert "no /sistem" in say(shown, "/sistem x")
        say(shown, "/system You rhyme.")
        say(shown, "/clear")
        say(shown, "hello")
        assert contents(double.generates[-1]) == ["You rhyme.", "hello"]
        say(shown, "/system")
        say(shown, " /etc")
        assert contents(double.generates[-1]) == ["hello", "<0>", " /etc"]
        shown.press("/exit" + ENTER)
        assert shown.wait() == 0
    with ingress(answer_in_full) as double, chat(double, tmp_path, "--max-tokens", "1") as shown:
        say(shown, UP * 4)
        assert contents(double.generates[-1]) == ["hello"], "typed in the chat before"
        shown.press(CTRL_D)
        assert shown.wait() == 0
    assert (tmp_path / "nanovllm" / "chat_history").stat().st_mode & 0o077 == 0


def test_ctrl_c_stops_an_answer_and_not_the_chat(tmp_path: Path) -> None:
    def script(message: Any, session: str) -> Iterator[Answer]:
        if isinstance(message, Generate) and contents(message)[-1] == "some":
            yield from some_then_silence(message, session)
        elif isinstance(message, Generate) and contents(message)[-1] == "none":
            yield from written(message, session)
        else:
            yield from answer_in_full(message, session)

    with ingress(script) as double, chat(double, tmp_path, "--max-tokens", "2") as shown:
        shown.press("none" + ENTER)
        double.wait_for(lambda received: isinstance(received[-1], Generate))
        shown.press(CTRL_C)
        double.wait_for(has_abort)
        shown.wait_for(PROMPT)
        shown.press("some" + ENTER)
        shown.wait_for("\na")
        shown.press(CTRL_C)
        shown.wait_for(PROMPT)
        shown.press("not sent" + CTRL_C)
        shown.wait_for(PROMPT)
        say(shown, "go on")
        assert contents(double.generates[-1]) == ["some", "a", "go on"]
        shown.press(CTRL_D)
        assert shown.wait() == 0


def test_ctrl_c_between_answers_does_not_end_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    def typed() -> Iterator[str]:
        yield "hello"
        signal.raise_signal(signal.SIGINT)  # comes a little late
        yield "go on"

    monkeypatch.setattr("nanovllm.client.chat._typed", typed)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    before = signal.getsignal(signal.SIGINT)
    with ingress(answer_in_full) as double, Client(double.endpoint) as client:
        try:
            Chat(client, SamplingParams(max_tokens=1), None, None).run()
        except KeyboardInterrupt:
            pytest.fail("the chat has ended")
        finally:
            signal.signal(signal.SIGINT, before)
        assert contents(double.generates[-1]) == ["hello", "<0>", "go on"]


def test_ctrl_c_ends_a_chat_whose_messages_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "messages").write_text("one\ntwo\n")
    with ingress(some_then_silence) as double, (tmp_path / "messages").open() as messages:
        command = (*NANOVLLM, "chat", "--endpoint", double.endpoint)
        with subprocess.Popen(command, stdin=messages, stdout=subprocess.PIPE) as ran:
            double.wait_for(lambda received: any(isinstance(m, Generate) for m in received))
            ran.send_signal(signal.SIGINT)
            try:
                assert ran.wait(TIMEOUT_S) == 130
            finally:
                ran.kill()
        assert len(double.generates) == 1


def test_a_chat_that_no_longer_fits_forgets_its_oldest_turns_and_says_so(tmp_path: Path) -> None:
    def script(message: Any, session: str) -> Iterator[Answer]:
        if isinstance(message, Generate) and sum(map(len, contents(message))) > 20:
            yield Error(id=message.id, code="context_length_exceeded", message="too long")
        else:
            yield from answer_in_full(message, session)

    options = ("--max-tokens", "1", "--system", "S")
    with ingress(script) as double, chat(double, tmp_path, *options) as shown:
        for text in ("first", "second"):
            assert "forgotten" not in say(shown, text)
        assert "context_length_exceeded: too long" in say(shown, "x" * 30)
        assert "its oldest turn is forgotten" in say(shown, "third one")
        assert contents(double.generates[-1]) == ["S", "second", "<0>", "third one"]
        assert "its 2 oldest turns are forgotten" in say(shown, "y" * 19)
        assert contents(double.generates[-1]) == ["S", "y" * 19]


def test_thinking_is_dim_and_so_is_what_is_told_of_an_answer(tmp_path: Path) -> None:
    def script(message: Any, session: str) -> Iterator[Answer]:
        if isinstance(message, Generate):
            yield from written(message, session, "<thi", "nk>hm", "m</think>", "yes")
            yield finish(message, "stop")

    with ingress(script) as double, chat(double, tmp_path) as shown:
        say(shown, "hello")
        answer = shown.raw.partition("\x1b[2m<think>")[2].partition(PROMPT)[0]
    before, _, after = answer.partition("yes")
    assert before.replace("\x1b[0m", "").replace("\x1b[2m", "") == "hmm</think>"
    assert before.endswith("\x1b[0m"), "what it says is not dim"
    assert after.startswith("\r\n\x1b[2m[2 tokens, ")
    assert "tokens/s]\x1b[0m" in after


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_nothing_is_dim_where_no_styles_are_wanted(variable: str, value: str) -> None:
    with ingress(answer_in_full) as double:
        options = ("--endpoint", double.endpoint, "--max-tokens", "2")
        with terminal((*NANOVLLM, "generate", "hello", *options), **{variable: value}) as shown:
            assert shown.wait() == 0
            assert "\r\n[cut by --max-tokens 2]\r\n" in shown.raw


def test_an_error_begins_on_a_line_of_its_own(tmp_path: Path) -> None:
    def script(message: Any, session: str) -> Iterator[Answer]:
        if isinstance(message, Generate):
            yield from written(message, session, "once")
            yield Error(id=message.id, code="internal", message="broken")

    with ingress(script) as double:
        command = (*NANOVLLM, "generate", "hello", "--endpoint", double.endpoint)
        with terminal(command) as shown:
            assert shown.wait() == 1
            assert shown.shown == "once\nError: internal: broken\n"
        with chat(double, tmp_path) as shown:
            assert "\nonce\nError: internal: broken\n" in say(shown, "hello") + "\n"


@pytest.mark.parametrize(
    ("max_tokens", "why"),
    [("2", "cut by --max-tokens 2"), ("3", "cut: prompt and answer fill the model's length")],
)
def test_a_cut_is_told_on_a_terminal_alone(max_tokens: str, why: str) -> None:
    def script(message: Any, session: str) -> Iterator[Answer]:
        if isinstance(message, Generate):
            yield from written(message, session, "a", "b")
            yield finish(message)  # of two tokens

    with ingress(script) as double:
        options = ("--endpoint", double.endpoint, "--max-tokens", max_tokens)
        command = (*NANOVLLM, "generate", "hello", *options)
        with terminal(command) as shown:
            assert shown.wait() == 0
            assert shown.shown == f"ab\n[{why}]\n"
        piped = subprocess.run(command, capture_output=True, text=True, check=True)
        assert (piped.stdout, piped.stderr) == ("ab\n", "")


def test_ctrl_c_ends_generate_quietly() -> None:
    with ingress(some_then_silence) as double:
        command = (*NANOVLLM, "generate", "hello", "--endpoint", double.endpoint)
        with terminal(command) as shown:
            shown.wait_for("a")
            shown.press(CTRL_C)
            assert shown.wait() == 130
            assert shown.shown == "a^C\n"
            double.wait_for(lambda received: isinstance(received[-1], Abort))


def test_ctrl_c_ends_a_command_quietly_while_it_imports(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    for command in ("nanovllm", "nanovllm.launch"):
        main = (
            f"import sys; from nanovllm.__main__ import *; sys.path.insert(0, {str(tmp_path)!r});"
        )
        main += "main()" if command == "nanovllm" else "launch()"
        ran = subprocess.run([sys.executable, "-c", main], capture_output=True, text=True)
        assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "")


@given(
    pieces=st.lists(
        st.sampled_from(["<think>", "</think>", "<", "think", ">", "</", "x", "<th", "<think></"])
    ),
    cuts=st.sets(st.integers(0, 60)),
)
def test_thinking_is_found_however_the_text_is_cut(pieces: list[str], cuts: set[int]) -> None:
    def split(parts: list[str]) -> list[tuple[str, bool]]:
        splitter = ThinkingSplitter()
        found = [part for text in parts for part in splitter.split(text)]
        return [(c, thinking) for text, thinking in [*found, *splitter.rest()] for c in text]

    text = "".join(pieces)
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert split(parts) == split([text])
    assert "".join(character for character, _ in split(parts)) == text
    thought, said = "a <think>b <think> c</think>d</think>", "a d</think>"
    assert "".join(c for c, thinking in split([thought]) if not thinking) == said
