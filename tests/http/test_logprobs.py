"""Logprobs as chats and completions write them."""

from __future__ import annotations

import gc

import pytest

from nanovllm.services.http.openai.logprobs import LOWEST, CompletionLogprobsWriter, chat_logprobs

# A smile in two tokens, a letter, and a special token.
TEXT = {1: b"\xf0\x9f", 2: b"\x98\x80", 3: b"a", 4: b"<|end|>"}
ENTRIES = [
    [(1, -0.5), (3, -0.75)],
    [(2, float("-inf")), (1, -1.0), (3, -2.0)],
    [(4, -0.25)],
    [(3, -0.125)],
]


def test_a_chat_has_the_true_bytes_of_half_characters() -> None:
    content = chat_logprobs(ENTRIES, TEXT).content
    assert b"".join(bytes(entry.bytes) for entry in content) == b"\xf0\x9f\x98\x80<|end|>a"
    assert content[0].token == "\N{REPLACEMENT CHARACTER}"
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("a", -0.75)]
    assert content[1].logprob == LOWEST, "JSON has no infinity"


def test_what_a_chat_writes_costs_no_garbage_collection() -> None:
    first, again = (chat_logprobs(ENTRIES, TEXT).content[0] for _ in range(2))
    assert not any(map(gc.is_tracked, (first, *first.top_logprobs)))
    assert first.bytes is again.bytes


def test_a_completion_has_offsets_into_its_text() -> None:
    writer = CompletionLogprobsWriter(TEXT, frozenset({4}))
    writer.add(ENTRIES)
    whole = writer.take()
    assert whole is not None
    assert whole.tokens == ["bytes:\\xf0\\x9f", "bytes:\\x98\\x80", "<|end|>", "a"]
    assert whole.text_offset == [0, 0, 1, 1]
    assert whole.top_logprobs[1] == {"bytes:\\xf0\\x9f": -1.0, "a": -2.0}
    assert writer.take() is None
    writer = CompletionLogprobsWriter(TEXT, frozenset({4}))
    offsets: list[int] = []
    for entry in ENTRIES:
        writer.add([entry])
        piece = writer.take()
        assert piece is not None
        offsets += piece.text_offset
    assert offsets == whole.text_offset


@pytest.mark.parametrize(
    ("text", "offsets"),
    [("<|end|>\N{GRINNING FACE}a", [0, 7, 7, 8, 9]), ("\N{GRINNING FACE}a", [0, 0, 0, 1, 2])],
)
def test_a_prompt_counts_its_special_tokens_where_its_text_has_them(
    text: str, offsets: list[int]
) -> None:
    writer = CompletionLogprobsWriter(TEXT, frozenset({4}))
    writer.add_prompt(text, 4, [None, [(1, -1.0), (3, -0.5)], [(2, -2.0)], [(3, -3.0)]])
    writer.add([[(4, -0.25)]])
    written = writer.take()
    assert written is not None
    assert written.text_offset == offsets
    assert written.token_logprobs == [None, -1.0, -2.0, -3.0, -0.25]
    assert written.top_logprobs == [None, {"a": -0.5}, {}, {}, {}]
