"""docs/protocol.md tells the truth: its frames are what its messages encode to."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from nanovllm.protocol import (
    ClientMessage,
    ErrorCode,
    Generate,
    Ping,
    Pong,
    Sampling,
    ServerMessage,
)
from nanovllm.services.ingress.frames import Limits, parse

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
FRAMES = re.findall(r"```\n([\[{].*?)\n\n([0-9a-f \n]+)\n```", PAGE, re.DOTALL)
ERRORS = re.search(r"### Errors.*?```\n(.*?)\n```.*?```\n(.*?)\n```", PAGE, re.DOTALL)


def test_there_are_examples() -> None:
    assert len(FRAMES) == 3


@pytest.mark.parametrize(("message", "frame"), FRAMES)
def test_the_bytes_are_those_of_the_message(message: str, frame: str) -> None:
    raw = bytes.fromhex(frame)
    kind = list[ServerMessage] if message.startswith("[") else ClientMessage
    msgspec.msgpack.decode(raw, type=kind)
    assert msgspec.msgpack.decode(raw) == json.loads(message)


def test_every_key_and_code_is_on_the_page() -> None:
    names = [*Generate.__struct_fields__, *Sampling.__struct_fields__, *get_args(ErrorCode)]
    assert [name for name in names if f"| `{name}` |" not in PAGE] == []


def test_the_errors_are_those_of_the_frames() -> None:
    assert ERRORS is not None
    limits = Limits(vocab_size=1000, max_model_len=64, max_message_bytes=1 << 20)
    frames = [msgspec.msgpack.encode(json.loads(line)) for line in ERRORS[1].splitlines()]
    ping, *errors = [parse(frame, limits) for frame in frames]
    pong, *told = msgspec.json.decode(ERRORS[2], type=list[ServerMessage])
    assert isinstance(ping, Ping)
    assert isinstance(pong, Pong)
    assert errors == told
