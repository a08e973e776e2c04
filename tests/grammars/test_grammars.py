"""Matchers: which tokens may come next in an answer, and where it may end."""

from __future__ import annotations

import json
import random
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanovllm.checkpoint import ModelConfig
from nanovllm.grammars import GrammarError, Grammars, MaskFiller, Matcher
from nanovllm.messages import AnswerMarks
from nanovllm.protocol import StructuredOutputs
from nanovllm.vocabulary import Vocabulary
from tests.bpe import EOS, tiny_tokenizer, token_id, write_checkpoint_files

TOKENIZER = tiny_tokenizer()
# Three ids more than the tokenizer has, and no multiple of 32.
VOCAB_SIZE = TOKENIZER.get_vocab_size() + 3
END = token_id(EOS)
OPEN, CLOSE = token_id("<think>"), token_id("</think>")
FILLER = MaskFiller()


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    directory = write_checkpoint_files(tmp_path_factory.mktemp("grammars"), vocab_size=VOCAB_SIZE)
    return Grammars.from_checkpoint(directory, ModelConfig.from_checkpoint(directory))


def allowed(grammars: Grammars, *matchers: Matcher) -> list[list[int]]:
    masks = np.zeros((len(matchers), grammars.words), dtype=np.int32)
    assert FILLER.fill(matchers, masks) == []
    return [
        np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        for mask in masks
    ]


def drawn(grammars: Grammars, matcher: Matcher, draw: random.Random, most: int = 400) -> list[int]:
    """An output, each of whose tokens is any that may come."""
    output: list[int] = []
    while len(output) < most and (not output or output[-1] != END):
        (tokens,) = allowed(grammars, matcher)
        # Long numbers, texts and white space are no better a test than short ones.
        output.append(END if END in tokens and draw.random() < 0.5 else draw.choice(tokens))
        assert matcher.advance(output[-1])
    return output


def text(output: list[int]) -> str:
    return str(TOKENIZER.decode([token for token in output if token != END]))


@given(draw=st.randoms(use_true_random=False))
def test_what_is_drawn_is_of_the_grammar(grammars: Grammars, draw: random.Random) -> None:
    choices = ["yes", 'no "\\\n', "日本語 or <|im_end|>", "naïve x"]
    output = drawn(grammars, grammars.matcher(StructuredOutputs(choice=choices)), draw)
    assert output[-1] == END
    assert text(output) in choices
    again = grammars.matcher(StructuredOutputs(choice=choices))
    for token in output:
        (tokens,) = allowed(grammars, again)
        assert token in tokens, "the same tokens are allowed when they are replayed"
        assert max(tokens) < VOCAB_SIZE - 3, "an id that the tokenizer lacks"
        assert (END in tokens) == (token == END), "no choice is the beginning of another"
        again.advance(token)


# In the form that the tokenizer brings text into.
texts = st.text(min_size=1, max_size=8).map(partial(unicodedata.normalize, "NFC"))


@given(st.lists(texts, min_size=1, max_size=4))
@example(["\u8c48"])
def test_a_choice_is_any_text(grammars: Grammars, choices: list[str]) -> None:
    for choice in [*choices, "\x7f", "\x00\u2028\\"]:
        output = TOKENIZER.encode(choice, add_special_tokens=False).ids
        asked = StructuredOutputs(choice=[*choices, "\x7f", "\x00\u2028\\"])
        assert grammars.matcher(asked, None, [*output, END])


@pytest.mark.parametrize(
    ("asked", "whole"),
    [
        (StructuredOutputs(regex="(ab?)+c|d{2}/"), "ababc"),
        (StructuredOutputs(grammar='start: "a" b\nb: /[0-9]+/ | "x"'), "a42"),
        (StructuredOutputs(json_schema='{"type": "integer"}'), "-17"),
        (StructuredOutputs(json_schema="true"), '[1, "a", null]'),
        (StructuredOutputs(json_object=True), '{"a": {"b": [1.5e3]}}'),
    ],
)
def test_end_of_sequence_is_allowed_where_the_grammar_may_end(
    grammars: Grammars, asked: StructuredOutputs, whole: str
) -> None:
    matcher = grammars.matcher(asked)
    output = TOKENIZER.encode(whole, add_special_tokens=False).ids
    for token in output:
        (tokens,) = allowed(grammars, matcher)
        assert token in tokens
        assert (END in tokens) == asked_whole(asked, matcher)
        assert matcher.advance(token)
    assert END in allowed(grammars, matcher)[0]
    assert matcher.advance(END)
    # What comes then is dropped, so that everything may come.
    assert len(allowed(grammars, matcher)[0]) >= VOCAB_SIZE
    assert matcher.advance(3)
    assert not matcher.failed


def asked_whole(asked: StructuredOutputs, matcher: Matcher) -> bool:
    return bool(matcher.ll_matcher.is_accepting())


@pytest.mark.parametrize("reasons", [False, True])
def test_the_grammar_begins_where_the_answer_does(grammars: Grammars, reasons: bool) -> None:
    marks = AnswerMarks(OPEN, CLOSE, reasons)
    asked = StructuredOutputs(choice=["one", " two"])
    matcher = grammars.matcher(asked, marks)
    (at_start,) = allowed(grammars, matcher)
    assert END not in at_start, "the answer is missing"
    if not reasons:
        (without,) = allowed(grammars, grammars.matcher(asked))
        assert at_start == sorted([*without, OPEN])
        matcher.advance(token_id("Ġ"))
        assert OPEN in allowed(grammars, matcher)[0], "white space tells nothing"
        matcher.advance(OPEN)
    (reasoning,) = allowed(grammars, matcher)
    assert set(reasoning) == set(range(VOCAB_SIZE - 3)) - {END}
    for token in [5, OPEN, 6, CLOSE]:
        matcher.advance(token)
    assert allowed(grammars, matcher) == allowed(grammars, grammars.matcher(asked))
    # The prompt has reasoned already.
    matcher = grammars.matcher(asked, AnswerMarks(OPEN, CLOSE, False, has_reasoned=True))
    assert allowed(grammars, matcher) == allowed(grammars, grammars.matcher(asked))
    # Marks in the answer are none.
    fixed = grammars.matcher(StructuredOutputs(choice=["one"]), marks)
    if not reasons:
        for token in TOKENIZER.encode("one", add_special_tokens=False).ids:
            fixed.advance(token)
        assert allowed(grammars, fixed) == [[END]]


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (StructuredOutputs(json_schema="nope"), "JSON is malformed"),
        (StructuredOutputs(json_schema='["a"]'), "json_schema"),
        (StructuredOutputs(json_schema="[" * 5000), "json_schema"),
        (StructuredOutputs(json_schema="false"), "Unsatisfiable"),
        (StructuredOutputs(json_schema='{"type": "foo"}'), "Invalid type: foo"),
        (StructuredOutputs(json_schema='{"not": {}}'), 'Unimplemented keys: ["not"]'),
        (
            StructuredOutputs(json_schema='{"if": {}, "x-guidance": {"lenient": true}}'),
            "Unimplemented",
        ),
        (StructuredOutputs(regex="(?=a)b"), "look-ahead"),
        (StructuredOutputs(regex="["), "unclosed character class"),
        (StructuredOutputs(grammar='start: "a"\n  b'), "2("),
        (StructuredOutputs(grammar="start: missing"), 'unknown name: "missing"'),
    ],
)
def test_a_grammar_that_is_wrong_or_not_supported_is_refused(
    grammars: Grammars, asked: StructuredOutputs, reason: str
) -> None:
    with pytest.raises(GrammarError) as refused:
        grammars.matcher(asked)
    assert reason in str(refused.value)
    assert "no_forcing" not in str(refused.value), "a line that the client has not written"


def test_output_that_does_not_fit_is_refused(grammars: Grammars) -> None:
    asked = StructuredOutputs(regex="[0-9]+")
    digits = TOKENIZER.encode("12x", add_special_tokens=False).ids
    grammars.matcher(asked, None, digits[:2])
    with pytest.raises(GrammarError, match=f"token {digits[2]}"):
        grammars.matcher(asked, None, digits)
    with pytest.raises(GrammarError):
        grammars.matcher(asked, None, [END])


def test_one_costly_output_costs_no_other_its_grammar(grammars: Grammars) -> None:
    """What matchers of a grammar have found out together has a limit: whoever reaches it fails,
    and fails no other for good."""
    asked = StructuredOutputs(regex="[ab]*a[ab]{17}X")
    draw = random.Random(0)
    letters = [token_id(letter) for letter in "ab"]
    both = np.zeros((2, grammars.words), dtype=np.int32)
    masks = np.full((1, grammars.words), -1, dtype=np.int32)
    failed = grammars.matcher(asked)
    for _ in range(100_000):
        if FILLER.fill([failed], masks):
            break
        failed.advance(draw.choice(letters))
    assert failed.failed
    assert not masks.any(), "a matcher that failed allows nothing"
    assert FILLER.fill([grammars.matcher(asked), grammars.matcher(asked, copy=1)], both) == [0]
    alone = grammars.matcher(asked, alone=True)
    assert FILLER.fill([alone, failed], both) == [1]
    assert FILLER.fill([grammars.matcher(asked)], masks) == []


def test_a_model_without_end_of_sequence_has_no_grammars() -> None:
    vocabulary = Vocabulary(text={0: b"a"}, longest_entry=1, size=1)
    grammars = Grammars(vocabulary.text, vocabulary.special, (), 1)
    with pytest.raises(GrammarError, match="no end-of-sequence token"):
        grammars.matcher(StructuredOutputs(json_object=True))


@pytest.mark.parametrize(
    "keys", [{}, {"json_object": False}, {"regex": "a", "choice": ["a"]}, {"regex": "a" * 300_000}]
)
def test_exactly_one_kind_of_a_bounded_size(keys: dict[str, object]) -> None:
    import msgspec

    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(json.dumps(keys), type=StructuredOutputs)


def test_the_tokenizers_own_end_of_sequence_counts(tmp_path: Path) -> None:
    directory = write_checkpoint_files(tmp_path, eos_token_id=None)
    grammars = Grammars.from_checkpoint(directory, ModelConfig.from_checkpoint(directory))
    assert grammars.eos == {END}
