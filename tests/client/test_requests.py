import enum
from collections import UserDict
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest

from nanovllm.client.requests import generate_message, sampling_of
from nanovllm.client.results import RequestError
from nanovllm.llm_requests import asks_for
from nanovllm.protocol import Generate, Sampling
from nanovllm.sampling_params import SamplingParams

HI = {"role": "user", "content": "hi"}
ask = partial(generate_message, sampling=Sampling(), stream=True)


class Role(enum.StrEnum):
    USER = "user"


def test_text_token_ids_and_chat_messages() -> None:
    assert ask("hello").prompt == "hello"
    assert ask([1, 2]).prompt_token_ids == [1, 2]
    assert ask((1, 2)).prompt_token_ids == [1, 2]
    array: Any = np.array([3, 4])
    assert ask(array).prompt_token_ids == [3, 4]
    chat = generate_message(
        [{"role": "user", "content": "hi"}],
        sampling_of(SamplingParams(max_tokens=3)),
        stream=False,
        chat_template_kwargs={"enable_thinking": False},
    )
    assert chat.messages == [{"role": "user", "content": "hi"}]
    assert chat.chat_template_kwargs == {"enable_thinking": False}
    assert (chat.stream, chat.sampling.max_tokens) == (False, 3)


@pytest.mark.parametrize(
    ("prompt", "meant"),
    [
        (np.str_("hello"), "hello"),
        (np.array("hello"), "hello"),
        (np.array([3, 4]), [3, 4]),
        ([np.int64(3), np.int8(4)], [3, 4]),
        ([{"role": Role.USER, "content": np.str_("hi")}], [HI]),
        ((UserDict(role="user", content="hi"),), [HI]),
    ],
)
def test_a_prompt_is_taken_for_what_it_is(prompt: Any, meant: Any) -> None:
    message = ask(prompt)
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=Generate)
    assert meant in (sent.prompt, sent.prompt_token_ids, sent.messages)


def test_other_arguments_are_taken_for_what_they_are() -> None:
    message = ask(
        [{"role": "user", "content": "hi"}],
        chat_template_kwargs={"enable_thinking": np.False_, "tools": [np.str_("a"), np.int64(1)]},
        cache_salt=np.str_("salt"),
    )
    assert message.chat_template_kwargs == {"enable_thinking": False, "tools": ["a", 1]}
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=Generate)
    assert sent == message


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", ValueError, "empty"),
        ([], ValueError, "empty"),
        ([-1], ValueError, "prompt_token_ids"),
        ([2**31], ValueError, "prompt_token_ids"),
        ([1.5], TypeError, "float"),
        (["a"], TypeError, "str"),
        ([1, True], TypeError, "bool, int"),
        (np.array([1.0]), TypeError, "float"),
        (np.array([[1], [2]]), TypeError, "list"),
        (np.array(5), TypeError, "int"),
        (None, TypeError, "NoneType"),
        (b"bytes", TypeError, "bytes"),
        ({"role": "user", "content": "x"}, TypeError, "dict"),
        ("caf\udce9", ValueError, "not valid Unicode"),
        ([{"role": "user", "content": "caf\udce9"}], ValueError, "not valid Unicode"),
        ([{"role": "user", "content": 2**64}], ValueError, "more than 64 bits"),
    ],
)
def test_a_wrong_prompt_is_refused_and_named(
    prompt: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ask(prompt)


def test_a_prompt_that_holds_itself_is_refused() -> None:
    content: list[Any] = []
    content.append(content)
    with pytest.raises(ValueError, match="nested too deeply"):
        ask([{"role": "user", "content": content}])


def test_template_arguments_need_a_chat() -> None:
    with pytest.raises(ValueError, match="chat_template_kwargs"):
        ask("text", chat_template_kwargs={"a": 1})


@pytest.mark.parametrize("name", ["tools", "chat_template_kwargs", "cache_salt"])
@pytest.mark.parametrize("value", ["\ud800", {"a": 2**64}, object()])
def test_an_argument_that_cannot_be_sent_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        ask([HI], **{name: value})


def test_parameters_are_sampling_params() -> None:
    params: Any = {"temperature": 1}
    with pytest.raises(TypeError, match="SamplingParams, not dict"):
        sampling_of(params)
    with pytest.raises(ValueError, match="n is for LLM"):
        sampling_of(SamplingParams(n=2))


def test_a_request_keeps_nothing_of_its_program() -> None:
    """A client encodes a request again when it submits the request again."""
    required, content, said = ["a"], ["x"], ["y"]
    message = ask(
        [{"role": "user", "content": content}],
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"r": required}}}],
        chat_template_kwargs={"said": said},
    )
    before = msgspec.msgpack.encode(message)
    for held in (required, content, said):
        held.append("later")
    assert msgspec.msgpack.encode(message) == before


def test_n_requests_of_a_prompt_that_is_read_once() -> None:
    params = SamplingParams(seed=7, n=3)
    prompts: Any = [iter([1, 2]), "", "a"]
    asks = asks_for(prompts, params, partial(generate_message, stream=False), return_errors=True)
    assert [one.prompt for one in asks] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    sent = [one.message for one in asks if isinstance(one.message, Generate)]
    assert [one.prompt_token_ids for one in sent] == [[1, 2]] * 3 + [None] * 3
    assert [one.sampling.seed for one in sent] == [7, 8, 9] * 2
    assert len({one.id for one in sent}) == 6
    assert all(isinstance(one.message, RequestError) for one in asks[3:6])
