"""Grammars of structured outputs: which tokens may come next.

The tokenizer makes a request's matcher to see whether the request can be served; each rank of a
worker group makes the matcher anew, and fills the masks of its rows. Both decide alike: they read
the same vocabulary, and their limits count work, never time.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from llguidance import (
    LLExecutor,
    LLMatcher,
    LLParserLimits,
    LLTokenizer,
    TokenizerWrapper,
    regex_to_lark,
)
from numpy.typing import NDArray

from nanovllm.checkpoint import ModelConfig
from nanovllm.messages import AnswerMarks
from nanovllm.protocol import JSON_WHITE_SPACE, StructuredOutputs
from nanovllm.token_sets import WORD_BITS, num_words, token_set
from nanovllm.vocabulary import Vocabulary, end_of_sequence

# Fewer masks than this are not filled on threads, of which there are so many at most.
FEW: Final = 8
MOST_THREADS: Final = 8
# How many grammars are kept, compiled. A state of a lexer takes 1 to 2 kB.
KEPT: Final = 64
# Threads that fill masks of one compiled grammar wait for one another. More copies than this would
# find out the same more often.
MOST_COPIES: Final = 4
# With llguidance's own limits a mask of an ambiguous grammar takes seconds.
LIMITS: Final = LLParserLimits(
    max_items_in_row=1000,
    step_max_items=5000,
    max_lexer_states=20_000,
    verbose_errors=False,
)
MAX_REASON_CHARS: Final = 300

Masks = NDArray[np.int32]


class GrammarError(ValueError):
    """The grammar is wrong, not supported or too costly, or does not take the output."""


class Grammars:
    """Compiles grammars for one vocabulary, and keeps some. Threads may share it.

    Args:
        text: of each token id its bytes, without special tokens.
        special: the special tokens' names.
        eos: end-of-sequence ids.
        vocab_size: how many token ids the model has logits of.

    Attributes:
        words: the int32 words of a mask, see `token_sets`.
    """

    def __init__(
        self,
        text: Mapping[int, bytes],
        special: Mapping[int, bytes],
        eos: Sequence[int],
        vocab_size: int,
    ) -> None:
        self.words = num_words(vocab_size)
        self.text = text
        self.eos = frozenset(eos)
        self._tokenizer = None
        if eos:
            tokens = _Tokens(text, special, eos, vocab_size)
            self._tokenizer = LLTokenizer(TokenizerWrapper(tokens), vocab_size, list(eos))
        known = {*text, *special}.intersection(range(vocab_size)) - self.eos
        self.reasoning_mask = token_set(known, self.words)
        self._kept: OrderedDict[bytes, dict[int, LLMatcher]] = OrderedDict()  # copies by number
        self._lock = threading.Lock()

    @classmethod
    def from_checkpoint(cls, directory: Path, config: ModelConfig) -> Grammars:
        """Raises CheckpointError if the tokenizer's files cannot be used."""
        vocabulary = Vocabulary.from_checkpoint(directory)
        eos = end_of_sequence(directory, config, vocabulary)
        return cls(vocabulary.text, vocabulary.special, eos, config.vocab_size)

    def matcher(
        self,
        asked: StructuredOutputs,
        marks: AnswerMarks | None = None,
        output: Sequence[int] = (),
        *,
        alone: bool = False,
        copy: int = 0,
    ) -> Matcher:
        """The matcher of a sequence whose output so far is `output`.

        Args:
            alone: whether to share nothing with other matchers. Matchers of one copy of a grammar
                share what they have found out, and the limit of how much that may be: give True
                where such a matcher has failed. No copy is shared any more, then.
            copy: which copy of the grammar to use. Masks of different copies are filled at the same
                time.

        Raises:
            GrammarError: if there can be none; says why.
        """
        if alone:
            with self._lock:
                self._kept.pop(msgspec.msgpack.encode(asked), None)
        compiled = self._compile(asked) if alone else self._kept_grammar(asked, copy)
        matcher = Matcher(self, compiled, marks)
        for count, token_id in enumerate(output):
            if not matcher.advance(token_id):
                raise GrammarError(f"does not take token {token_id}, the output's token {count}")
        return matcher

    def _kept_grammar(self, asked: StructuredOutputs, copy: int) -> LLMatcher:
        key = msgspec.msgpack.encode(asked)
        with self._lock:
            kept = self._kept.get(key, {}).get(copy)
        if kept is None:
            kept = self._compile(asked)
        with self._lock:
            kept = self._kept.setdefault(key, {}).setdefault(copy, kept)
            self._kept.move_to_end(key)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return kept.deep_copy()

    def _compile(self, asked: StructuredOutputs) -> LLMatcher:
        if self._tokenizer is None:
            raise GrammarError("this model has no end-of-sequence token")
        compiled = LLMatcher(self._tokenizer, _source(asked), log_level=0, limits=LIMITS)
        if compiled.is_error():
            raise GrammarError(_reason(compiled, asked))
        return compiled


class Matcher:
    """The way of one output through its grammar.

    The grammar begins where the answer does (see `AnswerMarks`). Before, all tokens may come but
    the end of sequence; and at the start of the output, what opens reasoning.
    """

    __slots__ = ("_ended", "_grammars", "_held", "_marks", "_matcher", "_reasons")

    def __init__(self, grammars: Grammars, matcher: LLMatcher, marks: AnswerMarks | None) -> None:
        self._grammars = grammars
        self._matcher = matcher
        reasons = marks is not None and not marks.has_reasoned
        self._marks = marks if reasons else None  # None from where the answer begins
        self._reasons = marks is not None and marks.reasons
        self._ended = False  # no token counts any more
        self._held = b""  # the text of the output, while it is white space

    @property
    def failed(self) -> bool:
        """Whether the grammar took too much work, or a token that it does not allow came."""
        return bool(self._matcher.is_error())

    @property
    def words(self) -> int:
        """The int32 words of its masks."""
        return self._grammars.words

    @property
    def has_begin(self) -> bool:
        """Whether the grammar allows a first token."""
        return any(self._matcher.compute_bitmask()) and not self.failed

    def advance(self, token_id: int) -> bool:
        """The output goes on with this token. Returns whether the grammar allows the token. After
        the end of sequence, or no token (a negative id), nothing counts."""
        if self._ended:
            return True
        if token_id < 0:
            self._ended = True
            return True
        if self._marks is not None and self._before_answer(token_id, self._marks):
            return True
        self._ended = token_id in self._grammars.eos
        return bool(self._matcher.consume_token(token_id))

    def _before_answer(self, token_id: int, marks: AnswerMarks) -> bool:
        """Whether the token is none of the answer."""
        if self._reasons:
            if token_id == marks.close:
                self._marks = None
            return True
        if token_id == marks.open:
            self._reasons = True
            return bool(self._matcher.reset())
        self._held += self._grammars.text.get(token_id, b"")
        text = self._held.decode(errors="replace")
        if text and not text.isspace():
            self._marks = None
        return False

    def whole_mask(self) -> Masks | int | None:
        """The mask, int32 [words] or a value for every word, where the grammar does not say."""
        if self._ended:
            return -1
        reasoning = self._marks is not None and self._reasons
        return self._grammars.reasoning_mask if reasoning else None

    @property
    def opening(self) -> int | None:
        """The token that opens reasoning, if it may come beside what the grammar allows."""
        return None if self._marks is None else self._marks.open

    @property
    def ll_matcher(self) -> LLMatcher:
        return self._matcher


class MaskFiller:
    """Fills masks: many of them on threads, where there are cores for these. To wake a thread may
    take longer than a few masks do."""

    def __init__(self) -> None:
        threads = _threads()
        self._executor = LLExecutor(threads) if threads > 1 else None

    def fill(self, matchers: Sequence[Matcher], masks: Masks) -> list[int]:
        """Writes the tokens that may come next.

        Args:
            masks: int32 [n, words], C-contiguous, one row a matcher. Empty for one that failed.

        Returns:
            The indices of the matchers that failed.
        """
        asked = []
        for index, matcher in enumerate(matchers):
            whole = matcher.whole_mask()
            if whole is None:
                asked.append((matcher.ll_matcher, index))
            else:
                masks[index] = whole
        start, size = masks.ctypes.data, masks.strides[0]
        if self._executor is not None and len(asked) > FEW:
            self._executor.unsafe_compute_mask_ptr(asked, start, size, len(matchers))
        else:
            for ll_matcher, index in asked:
                ll_matcher.unsafe_compute_mask_ptr(start + index * size, size)
        failed = []
        for ll_matcher, index in asked:
            if ll_matcher.is_error():
                masks[index] = 0
                failed.append(index)
            elif (opening := matchers[index].opening) is not None:
                bit = np.uint32(1 << opening % WORD_BITS)
                masks[index, opening // WORD_BITS] |= bit.view(np.int32)
        return failed


def copy_of(number: int) -> int:
    """The copy of its grammar for the matcher with this number. Few matchers made one after the
    other get one copy."""
    return number // FEW % max(1, min(MOST_COPIES, _threads()))


def _threads() -> int:
    """How many threads fill masks."""
    return min(MOST_THREADS, len(os.sched_getaffinity(0)) // 2)


class _Tokens:
    """The vocabulary as llguidance reads it. No token is forced, so nothing is tokenized."""

    bos_token_id = None

    def __init__(
        self,
        text: Mapping[int, bytes],
        special: Mapping[int, bytes],
        eos: Sequence[int],
        vocab_size: int,
    ) -> None:
        self.eos_token_id = eos[0]
        self.special_token_ids = sorted(i for i in {*special, *eos} if i < vocab_size)
        self.tokens = [text.get(i, special.get(i, b"")) for i in range(vocab_size)]

    def __call__(self, text: bytes) -> list[int]:
        return []


def _source(asked: StructuredOutputs) -> str:
    """The grammar in llguidance's form of Lark.

    Raises GrammarError if a schema is no JSON.
    """
    if asked.grammar is not None:
        grammar = asked.grammar
    elif asked.regex is not None:
        grammar = f"start: /{regex_to_lark(asked.regex)}/"
    elif asked.choice is not None:
        choices = " | ".join(json.dumps(text) for text in asked.choice)
        grammar = f"start: {choices}"
    else:
        schema = asked.json_schema or '{"type": "object"}'
        grammar = f"start: %json {_strict(schema)}"
    # Else llguidance would allow but one tokenization of text that must come.
    return f'{grammar}\n%llguidance {{"no_forcing": true}}'


def _strict(schema: str) -> str:
    """The schema, so that an unsupported keyword is an error, and that white space ends."""
    try:
        value = msgspec.json.decode(schema, type=dict[str, Any] | bool)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"json_schema: {error}") from None
    if isinstance(value, bool):
        value = {} if value else {"enum": []}
    own = value.get("x-guidance")
    own = own if isinstance(own, dict) else {}
    if not own.keys() & {"whitespace_pattern", "whitespace_flexible"}:
        own["whitespace_pattern"] = JSON_WHITE_SPACE
    value["x-guidance"] = {**own, "lenient": False}
    return msgspec.json.encode(value).decode()


def _reason(matcher: LLMatcher, asked: StructuredOutputs) -> str:
    """Why the grammar cannot be compiled."""
    reason = re.split(r"\n *\d+ \| ", matcher.get_error(), maxsplit=1)[0]  # without its lines
    if asked.grammar is None:  # the client knows no lines of ours
        reason = re.sub(r"^at 1\(\d+\): (failed to compile JSON schema: )?", "", reason)
    reason = " ".join(reason.split())
    return reason if len(reason) <= MAX_REASON_CHARS else reason[:MAX_REASON_CHARS] + "…"
