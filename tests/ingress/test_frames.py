"""Any bytes of a client become a message, or an error that says what is wrong."""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.protocol import Abort, ClientMessage, Error, Generate, Ping
from nanovllm.services.ingress import frames
from nanovllm.services.ingress.frames import FRAMING, Limits
from tests.hostile import full_ask

LIMITS = Limits(vocab_size=1000, max_model_len=64, max_message_bytes=2 << 20)
encode = msgspec.msgpack.encode
CHAT = {"prompt": None, "messages": [{"role": "user", "content": "x"}]}

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
KEYS = st.sampled_from(
    [
        *["type", "id", "prompt", "prompt_token_ids", "messages", "sampling", "stream", "seed"],
        *["tools", "continue_final_message", "reasoning", "open", "close"],
        *["resume_token_ids", "chat_template_kwargs", "temperature", "stop", "cache_salt"],
    ]
)
TYPES = st.sampled_from(["generate", "abort", "ping", "finish", ""])


def read(frame: bytes) -> ClientMessage | Error:
    return frames.parse(frame, LIMITS)


def read_message(message: Any) -> ClientMessage | Error:
    return read(encode(message))


def deep(levels: int) -> Any:
    value: Any = None
    for _ in range(levels):
        value = [value]
    return value


def ask(**keys: Any) -> dict[str, Any]:
    return {"type": "generate", "id": "a", "prompt": "x", **keys}


def test_every_kind_of_message() -> None:
    generate = read_message(full_ask())
    assert isinstance(generate, Generate)
    assert generate.sampling.seed == -(2**63)
    assert read_message({"type": "abort", "id": "b"}) == Abort(id="b")
    assert read_message({"id": "c", "type": "ping"}) == Ping(id="c")
    assert read_message({"type": "ping"}) == Ping()


def test_structured_outputs_say_where_to_end() -> None:
    asked = {"structured_outputs": {"regex": "a+"}}
    assert isinstance(read_message(ask(sampling=asked)), Generate)
    error = read_message(ask(sampling={**asked, "ignore_eos": True}))
    assert isinstance(error, Error)
    assert error.message.startswith("sampling.ignore_eos: not beside structured_outputs")
    error = read_message(ask(sampling={"structured_outputs": {"regex": "a", "choice": ["b"]}}))
    assert isinstance(error, Error)
    assert error.message.startswith("sampling.structured_outputs: exactly one of json_schema,")


@given(st.binary(max_size=200))
def test_random_bytes_never_raise(frame: bytes) -> None:
    message = read(frame)
    assert isinstance(message, Generate | Abort | Ping | Error)
    if isinstance(message, Error):
        assert message.code == "invalid_request"
        assert message.message
        encode(message)


@given(st.data())
def test_mutated_messages_never_raise(data: st.DataObject) -> None:
    frame = bytearray(encode(data.draw(st.sampled_from([full_ask(), ask()]))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(frame) - 1))
        change = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if change == "flip":
            frame[at] = data.draw(st.integers(0, 255))
        elif change == "insert":
            frame[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        elif at:
            del frame[at:]
    encode(read(bytes(frame)))


@given(st.dictionaries(KEYS, PLAIN), TYPES)
def test_random_maps_never_raise(keys: dict[str, Any], kind: str) -> None:
    message = read_message({**keys, "type": kind})
    if isinstance(message, Error):
        known = keys.get("id")
        assert message.id == (known if isinstance(known, str) else None)


@given(PLAIN.filter(lambda value: not isinstance(value, dict)))
def test_a_frame_that_is_no_map_is_told_the_framing(value: Any) -> None:
    error = read_message(value)
    assert isinstance(error, Error)
    assert (error.id, error.code) == (None, "invalid_request")
    assert FRAMING in error.message


@pytest.mark.parametrize(
    "text",
    [
        b'{"type": "ping"}',
        b'[{"type": "ping"}]',
        b"\xef\xbb\xbf{}",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"hello",
        b"",
        b"\xc1",
        b"\x91\x91",
    ],
)
def test_a_frame_that_is_no_message_pack_is_told_so(text: bytes) -> None:
    error = read(text)
    assert isinstance(error, Error)
    assert error.message == f"not MessagePack: {FRAMING}"


@pytest.mark.parametrize("keys", [0, 16, 1 << 16])
def test_a_map_of_any_size_is_known_as_one(keys: int) -> None:
    error = read_message({f"{n}": 0 for n in range(keys)})
    assert isinstance(error, Error)
    assert FRAMING not in error.message


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"unknown": 1}, "unknown"),
        ({"id": 5}, "id"),
        ({"id": ""}, "id"),
        ({"id": "é" * 65}, "id"),
        ({"client": ""}, "client"),
        ({"client": "é" * 65}, "client"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt, prompt_token_ids and messages"),
        ({"prompt_token_ids": [1]}, "prompt, prompt_token_ids and messages"),
        ({"prompt": None, "prompt_token_ids": []}, "prompt_token_ids"),
        ({"prompt": None, "prompt_token_ids": [1, 1000]}, "prompt_token_ids"),
        ({"prompt": None, "prompt_token_ids": [1, -1]}, "prompt_token_ids"),
        ({"prompt": None, "prompt_token_ids": [1, "a"]}, r"prompt_token_ids\[1\]"),
        ({"prompt": None, "messages": []}, "messages"),
        ({"prompt": None, "messages": [{"role": "u"}, {}]}, r"messages\[1\].role: missing"),
        ({"prompt": None, "messages": [{"role": 5}]}, r"messages\[0\].role: a string"),
        ({"prompt": None, "messages": [{"role": ""}]}, r"messages\[0\].role"),
        ({"prompt": None, "messages": [{"role": "u", "content": b"x"}]}, "messages: only maps"),
        ({"prompt": None, "messages": [{"role": "u", "x": deep(32)}]}, "messages: .*32 deep"),
        ({"sampling": {"allowed_token_ids": [1] * 1001}}, "^sampling.allowed_token_ids: 1001 "),
        ({"sampling": {"stop_token_ids": [1] * 1001}}, "^sampling.stop_token_ids: 1001 "),
        ({"sampling": {"logit_bias": {"a": 1}}}, "^sampling.logit_bias: a key: "),
        ({"sampling": {"logit_bias": {1: "a"}}}, "^sampling.logit_bias: "),
        ({"tools": []}, "tools: goes with messages only"),
        ({"continue_final_message": True}, "continue_final_message: goes with messages only"),
        ({**CHAT, "tools": [5]}, r"tools\[0\]"),
        ({**CHAT, "tools": [{"a": {1: 2}}]}, "tools: only maps"),
        ({**CHAT, "tools": [{"a": "x" * (1 << 20)}]}, "tools: longer than 1048576 bytes"),
        ({"reasoning": {"open": 5}}, "close"),
        ({"reasoning": {"open": 5, "close": 1000}}, "reasoning: 1000 is not below"),
        ({"chat_template_kwargs": {}}, "chat_template_kwargs: goes with messages only"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": {1: 2}}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": b"bytes"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": "x" * 70_000}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": msgspec.msgpack.Ext(5, b"x")}}, "chat_template_kwargs"),
        ({"sampling": {"temperature": math.nan}}, "sampling.temperature"),
        ({"sampling": {"temperature": math.inf}}, "sampling.temperature"),
        ({"sampling": {"temperature": 10.5}}, "sampling.temperature"),
        ({"sampling": {"top_p": 0}}, "sampling.top_p"),
        ({"sampling": {"top_p": math.nan}}, "sampling.top_p"),
        ({"sampling": {"min_p": math.nan}}, "sampling.min_p"),
        ({"sampling": {"max_tokens": 0}}, "sampling.max_tokens"),
        ({"sampling": {"max_tokens": True}}, "sampling.max_tokens"),
        ({"sampling": {"top_k": -1}}, "sampling.top_k"),
        ({"sampling": {"seed": 2**63}}, "sampling.seed"),
        ({"sampling": {"logprobs": 21}}, "sampling.logprobs"),
        ({"sampling": {"stop": ["a"] * 17}}, "sampling.stop"),
        ({"sampling": {"stop": [""]}}, r"sampling.stop\[0\]"),
        ({"sampling": {"stop": ["a", "x" * 257]}}, r"sampling.stop\[1\]"),
        ({"sampling": {"stop_token_ids": [1000]}}, "sampling.stop_token_ids"),
        ({"sampling": {"heat": 1}}, "heat"),
        ({"sampling": 5}, "sampling"),
        ({"stream": 1}, "stream"),
        ({"resume_token_ids": [2**31]}, "resume_token_ids"),
        ({"resume_token_ids": [1000]}, "resume_token_ids"),
        ({"cache_salt": 5}, "cache_salt"),
        ({"type": "generat"}, "type"),
    ],
)
def test_an_error_names_the_key(keys: dict[str, Any], named: str) -> None:
    error = read_message(ask(**keys))
    assert isinstance(error, Error)
    assert error.code == "invalid_request"
    assert error.id == (None if keys.get("id") == 5 else keys.get("id", "a"))
    assert re.search(named, error.message), error.message


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"prompt": "BROKEN"}, "prompt: "),
        ({"id": "BROKEN"}, "id: "),
        ({"type": "BROKEN"}, "type: "),
        ({"cache_salt": "BROKEN"}, "cache_salt: "),
        ({"sampling": {"stop": ["é", "BROKEN"]}}, "sampling.stop[1]: "),
        ({"sampling": {"BROKEN": 1}}, "sampling: "),
        ({"messages": [{"role": "u", "content": "BROKEN"}]}, "messages[0].content: "),
        ({"chat_template_kwargs": {"a": {"b": ["BROKEN"]}}}, "chat_template_kwargs.a.b: "),
        ({"chat_template_kwargs": {"a": {"b": "BROKEN"}}, "x": 1}, "chat_template_kwargs.a.b: "),
        ({"BROKEN": 1}, ""),
    ],
)
def test_text_that_is_not_utf_8_is_named(keys: dict[str, Any], named: str) -> None:
    error = read(encode(ask(**keys)).replace(b"BROKEN", b"\xffROKEN"))
    assert isinstance(error, Error)
    assert error.id == (None if "id" in keys else "a")
    assert error.message == f"{named}not valid UTF-8: invalid start byte"


def test_lengths_beyond_the_model() -> None:
    def tokens(prompt: int, resumed: int = 0) -> ClientMessage | Error:
        return read_message(
            ask(prompt=None, prompt_token_ids=[1] * prompt, resume_token_ids=[1] * resumed)
        )

    for good in (tokens(63), tokens(63, 1), tokens(1, 63)):
        assert isinstance(good, Generate)
    text = read_message(ask(resume_token_ids=[1] * 64))
    for bad in (tokens(64), tokens(63, 2), tokens(10_000), text):
        assert isinstance(bad, Error)
        assert bad.code == "context_length_exceeded"
        assert "max_model_len" in bad.message


def test_broken_text_is_named_beside_what_is_nested_almost_too_deeply() -> None:
    for depth in range(900, 1000):
        deep = b"\xa8messages" + b"\x91" * depth + b"\xc0"
        error = read(b"\x84" + ASK_WITH[1:] + b"\xa6prompt\xa1\xff" + deep)
        assert isinstance(error, Error)
        assert re.fullmatch("nested too deeply|(prompt: )?not valid UTF-8: .*", error.message)


ASK_WITH = b"\x83\xa4type\xa8generate\xa2id\xa1a"
MESSAGES_TWICE = b"\x85" + ASK_WITH[1:] + b"\xa8messages\x91\x80\xa6prompt\xa1\xff\xa8messages"


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdd\xff",
        b"\xdc\xff\xff" + b"\xc0" * 65_535,
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xffabc",
        ASK_WITH + b"\xb4chat_template_kwargs\x81\xa1a" + b"\x91" * 50_000 + b"\xc0",
        ASK_WITH + b"\xb4chat_template_kwargs\x81\xa1a" + b"\x91" * 300 + b"\xc0",
        ASK_WITH + b"\xb4chat_template_kwargs\x81\x91\x01\x02",
        ASK_WITH + b"\xb4chat_template_kwargs\x81\x81\x01\x02\x03",
        ASK_WITH + b"\xb4chat_template_kwargs\x81\xa1a\xc7\x0c\xff" + b"\xff" * 12,
        ASK_WITH + b"\xb0prompt_token_ids\xdd\xff\xff\xff\xff\x01",
        ASK_WITH + b"\xa6prompt\xa2\xff\xfe",
        MESSAGES_TWICE + b"\x81\x81\x01\x02\x03",
        MESSAGES_TWICE + b"\xd7\xff" + b"\xff" * 8,
        ASK_WITH + b"\xa2\xff\xfe\x01",
        ASK_WITH + b"\x05\x01",
        b"\x82\xa4type\xa4ping\xa2id\xa2\xff\xfe",
        encode({"type": "ping"}) + b"\x00",
        encode({"type": "ping", "id": "x" * (2 << 20)}),
    ],
    ids=range(23),
)
def test_hostile_frames_get_an_error(frame: bytes) -> None:
    error = read(frame)
    assert isinstance(error, Error)
    assert len(error.message) < 400
