"""Decoded messages in any order, cut anywhere, come out once each and without a gap."""

from __future__ import annotations

import struct
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.messages import Decoded, PromptPart, TokenLogprobs, pack
from nanovllm.protocol import Delta
from nanovllm.services.ingress.output import Output


class Truth(NamedTuple):
    """A whole output: tokens, the text that each released, and how much of it was resumed."""

    tokens: list[int]
    texts: list[str]
    resumed: int

    def decoded(self, start: int, end: int) -> Decoded:
        """Tokens [start, end), as any attempt's detokenizer would send them."""
        return Decoded(
            uid=1,
            attempt=1,
            token_offset=start,
            text_offset=len("".join(self.texts[:start])),
            token_ids=pack(self.tokens[start:end]),
            text="".join(self.texts[start:end]),
            logprobs=tuple(logprobs(token) for token in self.tokens[start:end]),
            ending=None,
        )


def logprobs(token: int) -> TokenLogprobs:
    return TokenLogprobs(pack([token, 7]), struct.pack("<2f", -0.5, -1.5))


@st.composite
def truths(draw: st.DrawFn) -> Truth:
    tokens = draw(st.lists(st.integers(0, 999), min_size=1, max_size=12))
    texts = [draw(st.text(max_size=3)) for _ in tokens]
    return Truth(tokens, texts, draw(st.integers(0, len(tokens))))


@given(st.data(), truths())
def test_exactly_once_and_contiguous(data: st.DataObject, truth: Truth) -> None:
    output = Output(pack(truth.tokens[: truth.resumed]), with_logprobs=True)
    received: list[Delta] = []
    sent = truth.resumed
    for _ in range(data.draw(st.integers(1, 12))):
        # A detokenizer begins at what was resumed, and may be ahead of what has arrived here.
        start = data.draw(st.integers(truth.resumed, len(truth.tokens)))
        end = data.draw(st.integers(start, len(truth.tokens)))
        before = output.num_tokens
        first_text_unknown = before == truth.resumed and not received
        taken = output.add(truth.decoded(start, end))
        assert taken or start > before or first_text_unknown
        assert output.num_tokens == (max(before, end) if start <= before else before)
        if data.draw(st.booleans()) and (delta := output.take("a")) is not None:
            received.append(delta)
    if (rest := output.take("a")) is not None:
        received.append(rest)
    for delta in received:
        assert delta.offset == sent
        sent += len(delta.token_ids)
    assert sent == output.num_tokens
    assert output.take("a") is None
    delivered = slice(truth.resumed, sent)
    assert [t for delta in received for t in delta.token_ids] == truth.tokens[delivered]
    assert "".join(delta.text for delta in received) == "".join(truth.texts[delivered])
    entries = [e for d in received for e in (d.logprobs if isinstance(d.logprobs, list) else [])]
    assert entries == [[(t, -0.5), (7, -1.5)] for t in truth.tokens[delivered]]


@given(st.data(), truths(), st.integers(0, 40))
def test_the_answer_s_place_is_told_once(data: st.DataObject, truth: Truth, answer_at: int) -> None:
    """`answer_at` counts in the text of the delta in which the answer begins."""
    output = Output(pack(truth.tokens[: truth.resumed]), with_logprobs=False)
    whole = "".join(truth.texts)
    answer_at = min(answer_at, len(whole))
    text_before = len("".join(truth.texts[: truth.resumed]))
    told = []
    while output.num_tokens < len(truth.tokens):
        end = data.draw(st.integers(output.num_tokens + 1, len(truth.tokens)))
        decoded = truth.decoded(truth.resumed, end)
        if decoded.text_offset + len(decoded.text) >= answer_at:
            decoded.answer_at = answer_at
        assert output.add(decoded)
        if data.draw(st.booleans()) and (delta := output.take("a")) is not None:
            told.append((text_before, delta))
            text_before += len(delta.text)
    told.append((text_before, output.take_all("a")))
    found = [(at, delta) for at, delta in told if delta.answer_at is not msgspec.UNSET]
    if truth.resumed < len(truth.tokens):
        ((at, delta),) = found
        assert delta.answer_at == max(0, answer_at - at)
        assert max(0, answer_at - at) <= len(delta.text)


def test_text_that_comes_without_a_token() -> None:
    output = Output(b"", with_logprobs=False)
    assert output.add(Decoded(1, 1, 0, 0, pack([5]), "", (), None))
    assert output.add(Decoded(1, 1, 1, 0, b"", "é", (), None))
    assert output.add(Decoded(1, 1, 1, 0, b"", "é!", (), None))
    delta = output.take("a")
    assert delta == Delta(id="a", offset=0, token_ids=[5], text="é!")


@pytest.mark.parametrize(
    "decoded",
    [
        Decoded(1, 1, 3, 2, pack([1]), "a", (), None),
        Decoded(1, 1, 2, 3, pack([1]), "a", (), None),
        Decoded(1, 1, 2, 2, b"abc", "a", (), None),
    ],
    ids=["tokens missing", "text missing", "torn"],
)
def test_a_gap_is_refused_whole(decoded: Decoded) -> None:
    output = Output(b"", with_logprobs=False)
    output.add(Decoded(1, 1, 0, 0, pack([8, 9]), "xy", (), None))
    output.take("a")
    assert not output.add(decoded)
    assert output.take("a") is None
    assert output.num_tokens == 2


def test_resumed_text_goes_on_where_the_first_delta_says() -> None:
    output = Output(pack([1, 2]), with_logprobs=False)
    assert output.add(Decoded(1, 1, 2, 40, pack([3]), "abc", (), None))
    assert output.add(Decoded(1, 2, 2, 40, pack([3, 4]), "abcd", (), None))
    assert output.take("a") == Delta(id="a", offset=2, token_ids=[3, 4], text="abcd")
    assert output.tokens == pack([1, 2, 3, 4])


@pytest.mark.parametrize("width", [1, 2, 21])
def test_a_prompt_is_told_once_and_as_it_is(width: int) -> None:
    lengths = (0, 3, 1)
    values = [-0.5, float("-inf"), -1e-8, -3.25] * 21
    parts: list[PromptPart] = []
    expected: list[list[tuple[int, float]] | None] = [None]
    for length in lengths:
        ids = [2**31 - 1 - i for i in range(length * width)]
        floats = struct.pack(f"<{len(ids)}f", *values[: len(ids)])
        parts.append(PromptPart(len(expected), width, pack(ids), floats))
        pairs = list(zip(ids, struct.unpack(f"<{len(ids)}f", floats), strict=True))
        expected += [pairs[begin : begin + width] for begin in range(0, len(pairs), width)]
    output = Output(b"", with_logprobs=False)
    for again in range(2):
        decoded = Truth([4, 5], ["a", "b"], 0).decoded(0, 1 + again)
        decoded.prompt_parts = tuple(parts)
        output.add(decoded)
        told = msgspec.msgpack.decode(msgspec.msgpack.encode(output.take("id")), type=Delta)
        assert told.prompt_logprobs == (msgspec.UNSET if again else expected)
