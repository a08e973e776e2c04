"""Logprobs as chats and completions write them."""

from __future__ import annotations

from nanovllm.services.http.logprobs import LOWEST, CompletionLogprobsWriter, chat_logprobs

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


def test_a_completion_has_offsets_into_its_text() -> None:
    whole = CompletionLogprobsWriter(TEXT, frozenset({4})).write(ENTRIES)
    assert whole.tokens == ["bytes:\\xf0\\x9f", "bytes:\\x98\\x80", "<|end|>", "a"]
    assert whole.text_offset == [0, 0, 1, 1]
    assert whole.top_logprobs[1] == {"bytes:\\xf0\\x9f": -1.0, "a": -2.0}
    writer = CompletionLogprobsWriter(TEXT, frozenset({4}))
    pieces = [writer.write([entry]) for entry in ENTRIES]
    assert [offset for piece in pieces for offset in piece.text_offset] == whole.text_offset
