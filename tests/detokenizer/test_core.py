"""The detokenizer's core: any batching, replays, resumed outputs, ends."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.messages import (
    AnswerMarks,
    Begin,
    Decoded,
    End,
    Ending,
    Finished,
    NewTokens,
    TextOptions,
    TokenLogprobs,
    pack,
    pack_int64,
    unpack,
)
from nanovllm.protocol import FinishReason, Usage
from nanovllm.services.detokenizer.core import OUTPUTS_A_FRAME, Detokenizer
from nanovllm.services.detokenizer.text import TextDecoder
from nanovllm.vocabulary import Vocabulary
from tests.bpe import tiny_tokenizer
from tests.detokenizer.test_text import TEXT, ids_of_bytes, token_lists

tokenizer = tiny_tokenizer()
VOCABULARY = Vocabulary(text=TEXT, longest_entry=13, size=max(TEXT) + 1)
UID = 7 << 32 | 1


def begin(
    output: list[int] | None = None,
    *,
    uid: int = UID,
    attempt: int = 1,
    resumed: int = 0,
    stop: Iterable[str] = (),
    cached_tokens: int = 0,
    logprobs: Iterable[TokenLogprobs] = (),
    **options: Any,
) -> Begin:
    return Begin(
        uid,
        attempt,
        pack(output or []),
        resumed,
        TextOptions(list(stop), **options),
        10,
        cached_tokens,
        list(logprobs),
    )


def rows(
    *tokens: tuple[int, int, int, int], logprobs: dict[int, TokenLogprobs] | None = None
) -> NewTokens:
    """Of (uid, attempt, offset, token id) each."""
    uids, attempts, offsets, token_ids = zip(*tokens, strict=True)
    by_row = logprobs or {}
    return NewTokens(
        pack_int64(uids),
        pack(attempts),
        pack(offsets),
        pack(token_ids),
        pack(by_row),
        list(by_row.values()),
    )


class Ingress:
    """Takes decoded output as the ingress does: cuts what has come before, and refuses gaps."""

    def __init__(self, tokens: int = 0, chars: int = 0) -> None:
        self.first_token, self.first_char = tokens, chars
        self.tokens: list[int] = []
        self.text = ""
        self.logprobs: list[TokenLogprobs] = []
        self.ending: Ending | None = None
        self.answer_at: int | None = None

    def take(self, decoded: Decoded) -> None:
        tokens = unpack(decoded.token_ids).tolist()
        have = self.first_token + len(self.tokens)
        assert decoded.token_offset <= have
        assert not decoded.logprobs or len(decoded.logprobs) == len(tokens)
        self.tokens += tokens[have - decoded.token_offset :]
        self.logprobs += decoded.logprobs[have - decoded.token_offset :]
        have = self.first_char + len(self.text)
        assert decoded.text_offset <= have
        self.text += decoded.text[have - decoded.text_offset :]
        self.ending = decoded.ending
        assert self.answer_at in (None, decoded.answer_at)
        self.answer_at = decoded.answer_at
        assert self.answer_at is None or self.answer_at <= self.first_char + len(self.text)


def flush(core: Detokenizer) -> list[Decoded]:
    frame = core.frame()
    core.sent(frame)
    return frame


def only(core: Detokenizer) -> Decoded:
    (decoded,) = flush(core)
    return decoded


def ended(reason: FinishReason, completion_tokens: int, cached_tokens: int = 0) -> Ending:
    return Ending(reason, Usage(10, completion_tokens, cached_tokens))


def reference(token_ids: list[int], stops: list[str]) -> tuple[str, int, FinishReason]:
    """Text, tokens and reason: decoded prefix by prefix until one holds a stop string."""
    for count in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[:count], skip_special_tokens=True)
        if starts := [text.find(stop) for stop in stops if stop in text]:
            return text[: min(starts)], count, "stop"
    return tokenizer.decode(token_ids, skip_special_tokens=True), len(token_ids), "length"


@st.composite
def outputs_and_stops(draw: st.DrawFn) -> tuple[list[int], list[str]]:
    """A token list, and stop strings of which some are in its text.

    None holds U+FFFD, which the reference sees in every incomplete character.
    """
    token_ids = draw(token_lists)
    text = tokenizer.decode(token_ids)
    stops = draw(st.lists(st.text(min_size=1, max_size=3), max_size=2))
    for _ in range(draw(st.integers(0, 2)) if text else 0):
        start = draw(st.integers(0, len(text) - 1))
        stops.append(text[start : start + draw(st.integers(1, 4))])
    return token_ids, [stop for stop in stops if "\ufffd" not in stop]


@given(outputs_and_stops(), st.randoms(use_true_random=False))
def test_the_joined_text_is_the_decoding_cut_before_the_stop(
    given_output: tuple[list[int], list[str]], choices: random.Random
) -> None:
    token_ids, stops = given_output
    core, ingress = Detokenizer(VOCABULARY), Ingress()
    core.take(begin(stop=stops))
    for offset, token_id in enumerate(token_ids):
        core.take(rows((UID, 1, offset, token_id)))
        if choices.random() < 0.5:
            for decoded in core.frame():
                ingress.take(decoded)
                if choices.random() < 0.7:  # else the sender does not know that it was sent
                    core.sent([decoded])
    core.take(Finished(UID, 1, "length", len(token_ids)))
    for decoded in flush(core):
        ingress.take(decoded)
    text, count, reason = reference(token_ids, stops)
    assert ingress.text == text
    assert ingress.tokens == token_ids[:count]
    assert ingress.ending == ended(reason, count)
    assert core.frame() == []


@given(outputs_and_stops(), st.data())
def test_resuming_anywhere_goes_on_exactly(
    given_output: tuple[list[int], list[str]], data: st.DataObject
) -> None:
    token_ids, stops = given_output
    _, count, reason = reference(token_ids, stops)
    resumed = data.draw(st.integers(0, count))
    held = data.draw(st.integers(resumed, len(token_ids)))

    straight, client = Detokenizer(VOCABULARY), Ingress()
    straight.take(begin(stop=stops))
    for offset, token_id in enumerate(token_ids[:resumed]):
        straight.take(rows((UID, 1, offset, token_id)))
    for decoded in flush(straight):
        client.take(decoded)
    before = client.text
    for offset, token_id in enumerate(token_ids[resumed:], start=resumed):
        straight.take(rows((UID, 1, offset, token_id)))
    straight.take(Finished(UID, 1, "length", len(token_ids)))
    for decoded in flush(straight):
        client.take(decoded)

    again, rest = Detokenizer(VOCABULARY), Ingress(resumed, len(before))
    again.take(begin(token_ids[:held], resumed=resumed, stop=stops))
    for offset, token_id in enumerate(token_ids[held:], start=held):
        again.take(rows((UID, 1, offset, token_id)))
    again.take(Finished(UID, 1, "length", len(token_ids)))
    decoded = only(again)
    assert (decoded.token_offset, decoded.text_offset) == (resumed, len(before))
    rest.take(decoded)
    assert before + rest.text == client.text
    assert rest.tokens == token_ids[resumed:count]
    assert rest.ending == client.ending == ended(reason, count)


@given(outputs_and_stops(), st.integers(0, 6))
def test_a_stop_string_may_stay_in_the_text_and_comes_after_min_tokens(
    given_output: tuple[list[int], list[str]], min_tokens: int
) -> None:
    token_ids, stops = given_output
    stops = stops[:1]  # of several, which one is included is for another test to say
    core, ingress = Detokenizer(VOCABULARY), Ingress()
    core.take(begin(stop=stops, include_stop=True, min_tokens=min_tokens))
    # The text of whole characters, as it is released token by token.
    decoder = TextDecoder(VOCABULARY.text)
    pieces = [decoder.step(token_id) for token_id in token_ids] + [decoder.rest()]
    early = "".join(pieces[:min_tokens])
    rest = "".join(pieces[min_tokens:])
    for offset, token_id in enumerate(token_ids):
        core.take(rows((UID, 1, offset, token_id)))
        for decoded in flush(core):
            ingress.take(decoded)
    core.take(Finished(UID, 1, "length", len(token_ids)))
    for decoded in flush(core):
        ingress.take(decoded)
    found = rest.find(stops[0]) if stops else -1
    expected = early + (rest if found < 0 else rest[: found + len(stops[0])])
    assert ingress.text == expected
    assert ingress.ending is not None
    assert ingress.ending.reason == ("length" if found < 0 else "stop")


def test_special_tokens_can_be_in_the_text() -> None:
    vocabulary = Vocabulary({1: b"a", 2: b"b"}, 5, 9, special={7: b"<eos>"})
    for skip, text in ((True, "ab"), (False, "a<eos>b")):
        core = Detokenizer(vocabulary)
        core.take(begin([1, 7, 2], skip_special_tokens=skip))
        assert only(core).text == text


OPEN, CLOSE = "<think>", "</think>"


def test_line_breaks_behind_reasoning_do_not_stop_the_answer() -> None:
    opening, closing = tokenizer.encode(OPEN + CLOSE).ids
    core = Detokenizer(VOCABULARY)
    token_ids = tokenizer.encode(f"{OPEN}E{CLOSE}\n\ndog\n\nE").ids
    core.take(begin(token_ids, stop=["\n\n"], answer_marks=AnswerMarks(opening, closing, False)))
    assert only(core).text == f"{OPEN}E{CLOSE}\n\ndog"


PIECES = [OPEN, CLOSE, " ", "\n", "dog", "E", "END"]


def answer_begins(pieces: list[str], reasons: bool) -> int | None:
    """Before which piece the answer begins; None if it does not."""
    if not reasons and next((piece for piece in pieces if not piece.isspace()), "") != OPEN:
        return 0
    return pieces.index(CLOSE) + 1 if CLOSE in pieces else None


@given(
    st.lists(st.sampled_from(PIECES), max_size=12),
    st.booleans(),
    st.lists(st.sampled_from(["END", "D", "<", " ", "\n", "\nE"]), max_size=2),
    st.data(),
)
def test_the_answer_begins_where_the_marks_say(
    pieces: list[str], reasons: bool, stops: list[str], data: st.DataObject
) -> None:
    parts = [tokenizer.encode(piece).ids for piece in pieces]
    token_ids = [token_id for part in parts for token_id in part]
    expected: tuple[str, int | None] = "".join(pieces), None
    if (first := answer_begins(pieces, reasons)) is not None:
        begins = first  # where stop strings look, behind the line breaks after reasoning
        while 0 < first <= begins < len(pieces) and pieces[begins] == "\n":
            begins += 1
        answer, _, _ = reference([i for part in parts[begins:] for i in part], stops)
        expected = "".join(pieces[:begins]) + answer, len("".join(pieces[:first]))

    opening, closing = tokenizer.encode(OPEN + CLOSE).ids
    marks = AnswerMarks(opening, closing, reasons)
    core, ingress = Detokenizer(VOCABULARY), Ingress()
    core.take(begin(stop=stops, answer_marks=marks))
    texts = []
    for offset, token_id in enumerate(token_ids):
        core.take(rows((UID, 1, offset, token_id)))
        for decoded in flush(core):
            ingress.take(decoded)
        texts.append(ingress.text)
    core.take(Finished(UID, 1, "length", len(token_ids)))
    for decoded in flush(core):
        ingress.take(decoded)
    assert (ingress.text, ingress.answer_at) == expected

    resumed = data.draw(st.integers(0, len(ingress.tokens)))
    had = texts[resumed - 1] if resumed else ""
    again, rest = Detokenizer(VOCABULARY), Ingress(resumed, len(had))
    again.take(begin(token_ids, resumed=resumed, stop=stops, answer_marks=marks))
    again.take(Finished(UID, 1, "length", len(token_ids)))
    rest.take(only(again))
    assert (had + rest.text, rest.answer_at) == expected
    assert rest.ending == ingress.ending


def test_resumed_tokens_beyond_a_stop_string_all_count() -> None:
    core = Detokenizer(VOCABULARY)
    core.take(begin(ids_of_bytes(b"one END two"), resumed=11, stop=["END"]))
    assert only(core) == Decoded(UID, 1, 11, 4, b"", "", (), ended("stop", 11))
    core.take(rows((UID, 1, 11, 5)))
    core.take(Finished(UID, 1, "length", 12))
    assert core.frame() == []


def test_text_that_may_become_a_stop_string_waits() -> None:
    core = Detokenizer(VOCABULARY)
    core.take(begin(ids_of_bytes(b"a EN"), stop=["END"]))
    assert only(core).text == "a "
    core.take(rows((UID, 1, 4, ids_of_bytes(b"T")[0])))
    assert only(core) == Decoded(UID, 1, 4, 2, pack(ids_of_bytes(b"T")), "ENT", (), None)


def test_a_stop_string_completed_by_the_end_of_an_incomplete_character() -> None:
    core = Detokenizer(VOCABULARY)
    core.take(begin(ids_of_bytes(b"ab\xf0\x9f"), stop=["b\ufffd"]))
    assert only(core).text == "a"
    core.take(Finished(UID, 1, "length", 4))
    assert only(core) == Decoded(UID, 1, 4, 1, b"", "", (), ended("stop", 4))


def test_repeated_tokens_are_cut_and_gaps_wait_for_begin() -> None:
    core = Detokenizer(VOCABULARY)
    token_ids = ids_of_bytes(b"hello")
    core.take(begin())
    core.take(rows((UID, 1, 0, token_ids[0]), (UID, 1, 0, token_ids[0])))
    core.take(rows((UID, 1, 2, token_ids[2])))
    core.take(Finished(UID, 1, "length", 5))
    decoded = only(core)
    assert (decoded.text, decoded.ending) == ("h", None)
    core.take(begin(token_ids[:3], cached_tokens=8))
    core.take(begin(token_ids[:2], cached_tokens=8))
    assert only(core).text == "el"
    core.take(begin(token_ids, cached_tokens=8))
    decoded = only(core)
    assert (decoded.token_offset, decoded.text_offset) == (3, 3)
    assert (decoded.text, decoded.ending) == ("lo", ended("length", 5, cached_tokens=8))


def test_only_the_newest_attempt_counts() -> None:
    core = Detokenizer(VOCABULARY)
    core.take(begin(ids_of_bytes(b"old"), attempt=2))
    core.take(begin(ids_of_bytes(b"older"), attempt=1))
    core.take(rows((UID, 1, 3, 5), (UID + 1, 2, 0, 5)))
    core.take(Finished(UID, 1, "length", 3))
    assert only(core).text == "old"
    core.take(begin(ids_of_bytes(b"new"), attempt=3, resumed=1))
    core.take(rows((UID, 2, 3, 5)))
    assert only(core) == Decoded(UID, 3, 1, 1, pack(ids_of_bytes(b"ew")), "ew", (), None)
    assert core.stats().requests == 1


def test_a_new_attempt_without_news_takes_back_what_was_unsent() -> None:
    core = Detokenizer(VOCABULARY)
    core.take(begin(ids_of_bytes(b"ab"), attempt=1))
    core.take(begin(ids_of_bytes(b"ab"), attempt=2, resumed=2))
    assert core.frame() == []


def test_an_end_is_of_its_attempt_and_older_ones() -> None:
    core = Detokenizer(VOCABULARY)
    core.take(begin(ids_of_bytes(b"ab"), attempt=2))
    core.take(End(UID, 1))
    core.take(End(UID + 1, 9))
    assert core.stats().requests == 1
    core.take(End(UID, 3))
    core.take(rows((UID, 2, 2, 5)))
    assert core.frame() == []
    assert core.stats().requests == 0


def test_a_scheduler_that_connects_anew_begins_all_anew() -> None:
    core = Detokenizer(VOCABULARY)
    core.take(begin(ids_of_bytes(b"ab"), attempt=2))
    core.take(begin(ids_of_bytes(b"xy"), uid=UID + 1), engine=1)
    core.forget()
    core.take(rows((UID, 2, 2, 5)))
    assert [decoded.text for decoded in flush(core)] == ["xy"]
    assert core.stats().requests == 1
    core.take(begin(ids_of_bytes(b"abc"), attempt=2))
    assert (only(core).text, core.stats().requests) == ("abc", 2)


def test_many_requests_take_several_frames() -> None:
    core = Detokenizer(VOCABULARY)
    count = OUTPUTS_A_FRAME + 1
    for uid in range(count):
        core.take(begin(ids_of_bytes(b"a"), uid=uid))
    assert [len(flush(core)) for _ in range(3)] == [OUTPUTS_A_FRAME, 1, 0]


def logprobs_of(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(pack([token_id]), np.float32(-token_id).tobytes())


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
def test_logprobs_keep_to_their_tokens(resumed: int, earlier: int, later: int) -> None:
    """`earlier` tokens after the resumed ones were delivered by an earlier attempt."""
    total = resumed + earlier + later
    token_ids = list(range(1, total + 1))
    core = Detokenizer(VOCABULARY)
    fresh = [logprobs_of(t) for t in token_ids[resumed + earlier :]]
    core.take(begin(token_ids, resumed=resumed, logprobs=fresh))
    core.take(rows((UID, 1, total, 50), logprobs={0: logprobs_of(50)}))
    decoded = only(core)
    assert decoded.token_offset == resumed + earlier
    assert decoded.logprobs == (*fresh, logprobs_of(50))
    assert unpack(decoded.token_ids).tolist() == [*token_ids[resumed + earlier :], 50]


def test_logprobs_of_some_rows() -> None:
    core = Detokenizer(VOCABULARY)
    core.take(begin())
    core.take(begin(uid=UID + 1))
    core.take(rows((UID, 1, 0, 3), (UID + 1, 1, 0, 4), logprobs={1: logprobs_of(4)}))
    without, with_them = flush(core)
    assert without.logprobs == ()
    assert with_them.logprobs == (logprobs_of(4),)
