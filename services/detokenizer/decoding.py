"""One attempt's output: tokens in, decoded text out."""

from __future__ import annotations

from nanovllm.messages import Begin, Decoded, Ending, EndReason, Timings, TokenLogprobs, unpack_list
from nanovllm.protocol import Usage
from nanovllm.services.detokenizer.text import AnswerFinder, StopFinder, TextDecoder
from nanovllm.vocabulary import Vocabulary

TOKEN_BYTES = 4  # an int32


class Decoding:
    """The output of one attempt, decoded so far, and how much of it was sent.

    What was sent is not kept, and neither are tokens after the end of the output.
    """

    def __init__(self, begin: Begin, vocabulary: Vocabulary, engine: int) -> None:
        self._uid = begin.uid
        self.engine = engine  # whose scheduler has begun it
        self.attempt = begin.attempt
        options = begin.text
        self._decoder = TextDecoder(
            vocabulary.text if options.skip_special_tokens else vocabulary.whole_text
        )
        self._stops = StopFinder(options.stop, options.include_stop) if options.stop else None
        self._min_tokens = options.min_tokens
        # Until the answer begins.
        self._finder = AnswerFinder(options.answer_marks) if options.answer_marks else None
        self._answer_at: int | None = None
        self._breaks = False  # whether line breaks that come now are those behind reasoning
        self.count = 0  # tokens of the output so far
        self._chars = 0  # characters released so far, those of resumed tokens too
        # Unsent: tokens, the logprobs of each of them if it has any, and text.
        self._tokens = bytearray()
        self._logprobs: list[TokenLogprobs] = []
        self._pieces: list[str] = []
        self._sent_chars = 0
        self._reason: EndReason | None = None
        self._finish: tuple[EndReason, int] | None = None

        resumed = min(begin.resumed, len(begin.output) // TOKEN_BYTES)
        known = begin.output[: resumed * TOKEN_BYTES]
        for i, token_id in enumerate(unpack_list(known)):
            if not self.ended:
                self.push(token_id, known[i * TOKEN_BYTES : (i + 1) * TOKEN_BYTES])
        # All resumed tokens count as output, even if a stop string in them ended the output.
        self.count = resumed
        self.sent()
        self.update(begin)

    @property
    def ended(self) -> bool:
        return self._reason is not None

    @property
    def unsent(self) -> bool:
        """Whether there is output, or an end, to send. An end that was sent counts too."""
        return self.ended or bool(self._tokens)

    def update(self, begin: Begin) -> None:
        """Adds the tokens that the scheduler has and this output lacks, if there are any."""
        self._prompt_parts = tuple(begin.prompt_parts)
        self._prompt_tokens = begin.prompt_tokens
        self._cached_tokens = begin.cached_tokens
        self._timings = begin.timings
        held = self.count
        raw = begin.output[held * TOKEN_BYTES :]
        without_logprobs = len(begin.output) // TOKEN_BYTES - len(begin.token_logprobs)
        for i, token_id in enumerate(unpack_list(raw)):
            if self.ended:
                return
            row = held + i - without_logprobs
            self.push(
                token_id,
                raw[i * TOKEN_BYTES : (i + 1) * TOKEN_BYTES],
                begin.token_logprobs[row] if row >= 0 else None,
            )
        self._end_if_complete()

    def push(self, token_id: int, raw: bytes, logprobs: TokenLogprobs | None = None) -> None:
        """Adds the next token to an output that has not ended.

        Args:
            raw: the token as an int32.
            logprobs: once a token has logprobs, all later tokens have them. An earlier attempt has
                sent the tokens before.
        """
        if logprobs is not None:
            if not self._logprobs:
                self._tokens.clear()
            self._logprobs.append(logprobs)
        self._tokens += raw
        self.count += 1
        text = self._decoder.step(token_id)
        if self._finder is not None:
            self._release(self._finder.reasoning(token_id, text), stops=None)
            if not self._finder.found:
                return
            text = self._begin_answer(self._finder)
            self._breaks = not text
        if self._breaks:
            bare = text.lstrip("\n")
            self._release(text[: len(text) - len(bare)], stops=None)
            self._breaks, text = not bare, bare
        self._release(text, self._stops)

    def finish(
        self, reason: EndReason, completion_tokens: int, timings: Timings | None = None
    ) -> None:
        """The output ends with its `completion_tokens`-th token, unless a stop string ended it."""
        self._finish, self._timings = (reason, completion_tokens), timings
        self._end_if_complete()

    def decoded(self) -> Decoded:
        """All output that was not sent yet."""
        start = self.count - len(self._tokens) // TOKEN_BYTES
        return Decoded(
            self._uid,
            self.attempt,
            start,
            self._sent_chars,
            bytes(self._tokens),
            "".join(self._pieces),
            tuple(self._logprobs),
            None if self._reason is None else Ending(self._reason, self._usage()),
            self._answer_at,
            () if start else self._prompt_parts,
            self._timings,
        )

    def sent(self) -> None:
        """All output so far was sent."""
        self._tokens.clear()
        self._logprobs.clear()
        self._pieces.clear()
        self._sent_chars = self._chars

    def _end_if_complete(self) -> None:
        if self._finish is None or self.ended:
            return
        reason, completion_tokens = self._finish
        if self.count < completion_tokens:
            return  # the missing tokens come with the next `Begin`
        self._reason = reason
        rest = self._decoder.rest()
        if self._finder is not None:
            if self._finder.reasons:
                self._release(rest, stops=None)
                return
            rest = self._begin_answer(self._finder) + rest
        self._release(rest, self._stops)
        if self._stops is not None and not self._stops.found:
            self._release(self._stops.rest(), stops=None)

    def _begin_answer(self, finder: AnswerFinder) -> str:
        """The answer begins here; returns the text of it that was held."""
        self._answer_at = self._chars
        self._finder = None
        return finder.held

    def _release(self, text: str, stops: StopFinder | None) -> None:
        """Releases text, but for what may become one of these stop strings."""
        if stops is not None and self.count > self._min_tokens:
            text = stops.feed(text)
            if stops.found:
                self._reason = "stop"
        if text:
            self._pieces.append(text)
            self._chars += len(text)

    def _usage(self) -> Usage:
        return Usage(self._prompt_tokens, self.count, self._cached_tokens)
