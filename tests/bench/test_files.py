"""A person's files: what is in them, and what is wrong with them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nanovllm.bench.arrivals import Arrival, read_trace
from nanovllm.bench.files import InputFileError
from nanovllm.bench.prompts import read_prompts


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "file"
    path.write_text(text)
    return path


def test_sharegpt_gives_what_people_said_turn_by_turn(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """[{"id": "1", "conversations": [
            {"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello"}, {"from": "human", "value": "More"}]},
          {"id": "2", "conversations": [{"from": "gpt", "value": "Nobody asked"}]}]""",
    )
    system = {"role": "system", "content": "Be brief."}
    hi, more = ({"role": "user", "content": said} for said in ("Hi", "More"))
    assert read_prompts(path) == [[[system, hi], [more]]]


def test_json_lines_give_prompts_and_chats(tmp_path: Path) -> None:
    chat = '{"messages": [{"role": "user", "content": "Hi"}]}'
    path = written(tmp_path, f'{{"prompt": "Once", "source": "a book"}}\n\n{chat}\n')
    assert read_prompts(path) == [["Once"], [[{"role": "user", "content": "Hi"}]]]


def test_prompts_may_come_through_a_pipe() -> None:
    reader, writer = os.pipe()
    os.write(writer, b'{"prompt": "Once"}')
    os.close(writer)
    assert read_prompts(Path(f"/dev/fd/{reader}")) == [["Once"]]
    os.close(reader)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no prompt"),
        ("[]", "has no prompt"),
        ("once upon a time", "line 1: no JSON"),
        ('{"prompt": "a"}\n{"prompt": 3}', "line 2: prompt: Expected `str | null`, got `int`"),
        ('\n{"text": "a"}', "line 2: give it prompt or messages"),
        (f'{{"messages": [{{"year": {2**70}}}]}}', "line 1: messages: can't serialize ints"),
        ('[{"text": "a"}]', "missing required field `conversations`"),
    ],
)
def test_a_wrong_prompt_file_says_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputFileError) as raised:
        read_prompts(path)
    assert says in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_trace_is_sorted_and_its_time_stamps_begin_at_zero(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        '{"timestamp": 1700000002.5}\n{"timestamp": 1700000000, "input": 7, "output": 3}\n',
    )
    assert read_trace(path) == [Arrival(0.0, 7, 3), Arrival(2.5)]
    assert read_trace(written(tmp_path, '{"at_s": 4}')) == [Arrival(4.0)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no arrival"),
        ('\n{"at": 3}', "line 2: there is neither at_s nor timestamp"),
        ('{"at_s": -1}', "line 1: at_s: Expected `float` >= 0.0"),
        ('{"at_s": 1, "input": 0}', "line 1: input: Expected `int` >= 1"),
        ('{"at_s": 1, "output": 100000000000}', "line 1: output: Expected `int` <= 10000000"),
    ],
)
def test_a_wrong_trace_says_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputFileError) as raised:
        read_trace(written(tmp_path, text))
    assert says in str(raised.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"cannot read .*: No such file"):
        read_prompts(tmp_path / "nothing")
