"""Decoding and stop strings, against the tokenizers package and a naive reference."""

from __future__ import annotations

import time

from hypothesis import example, given
from hypothesis import strategies as st

from nanovllm.services.detokenizer.text import StopFinder, TextDecoder
from nanovllm.vocabulary import token_bytes
from tests.bpe import SPECIAL, tiny_tokenizer

tokenizer = tiny_tokenizer()
TEXT = {
    token_id: token_bytes(token)
    for token, token_id in tokenizer.get_vocab().items()
    if token not in SPECIAL
}
# Random ids are mostly invalid UTF-8; encoded text, cut and joined anywhere, mostly valid.
random_ids = st.lists(st.integers(0, tokenizer.get_vocab_size() + 20), max_size=40)
text_ids = st.text(max_size=20).map(lambda text: tokenizer.encode(text).ids)
token_lists = st.lists(st.one_of(random_ids, text_ids), max_size=4).map(
    lambda parts: [token_id for part in parts for token_id in part]
)


def ids_of_bytes(raw: bytes) -> list[int]:
    single = {piece: token_id for token_id, piece in TEXT.items() if len(piece) == 1}
    return [single[bytes([byte])] for byte in raw]


@given(token_lists)
@example(ids_of_bytes("😀日é".encode()))
@example(ids_of_bytes(b"\xf0\x9f\x98"))
@example(ids_of_bytes(b"\xe0\x80\xed\xa0\x80\xf4\x90\xff\xc2"))
@example(ids_of_bytes(b"\xa9" * 100))
def test_pieces_join_to_the_tokenizers_decoding(token_ids: list[int]) -> None:
    decoder = TextDecoder(TEXT)
    pieces = [decoder.step(token_id) for token_id in token_ids]
    expected = tokenizer.decode(token_ids, skip_special_tokens=True)
    assert "".join(pieces) + decoder.rest() == expected


@given(token_lists)
@example(ids_of_bytes(b"\xed\xa0"))
def test_all_complete_characters_are_released(token_ids: list[int]) -> None:
    decoder = TextDecoder(TEXT)
    released = ""
    for count, token_id in enumerate(token_ids, start=1):
        released += decoder.step(token_id)
        decoded = tokenizer.decode(token_ids[:count], skip_special_tokens=True)
        # A surrogate's first two bytes wait for the third, though they cannot become a character.
        assert decoded in (released + "\ufffd" * held for held in range(3))


def test_an_incomplete_character_is_held_across_special_tokens() -> None:
    decoder = TextDecoder(TEXT)
    first, second = ids_of_bytes("é".encode())
    assert decoder.step(first) == ""
    assert decoder.step(tokenizer.get_vocab()["<|im_end|>"]) == ""
    assert decoder.step(second) == "é"


# A small alphabet makes for overlaps and near misses.
small_text = st.text(alphabet="abé", max_size=6)
stop_lists = st.lists(st.text(alphabet="abé", min_size=1, max_size=5), min_size=1, max_size=4)


@given(st.lists(small_text, max_size=12), stop_lists)
@example(["a", "a", "b"], ["aab", "b"])
@example(["ab", "abé"], ["bab", "ababé"])
@example(["a", "abab"], ["abé", "bab", "b", "abab"])
def test_stop_strings_against_searching_all_text(pieces: list[str], stops: list[str]) -> None:
    finder = StopFinder(stops)
    released, whole = "", ""
    for piece in pieces:
        released += finder.feed(piece)
        whole += piece
        starts = [whole.find(stop) for stop in stops if stop in whole]
        assert finder.found == bool(starts)
        if starts:
            assert released == whole[: min(starts)]
            return
        held = max(
            (
                n
                for n in range(len(whole) + 1)
                if any(s.startswith(whole[len(whole) - n :]) for s in stops)
            ),
        )
        assert released == whole[: len(whole) - held]
    assert released + finder.rest() == whole


def test_long_stop_strings_take_no_longer_than_short_ones() -> None:
    """All of the text nearly becomes each of the stop strings, so that all of their length is
    held."""

    def seconds(length: int) -> float:
        stops = [" " * n + chr(ord("a") + n) + " " * (length - n - 1) for n in range(1, 17)]
        finder = StopFinder(stops)
        text = " " * 64
        started = time.process_time()
        released = sum(len(finder.feed(text)) for _ in range(1024))
        took = time.process_time() - started
        assert released + len(finder.rest()) == 64 * 1024
        return took

    short = min(seconds(20) for _ in range(3))
    assert min(seconds(256) for _ in range(3)) < 4 * short
