"""All outputs that one detokenizer decodes: the scheduler's messages in, decoded text out."""

from __future__ import annotations

from itertools import islice

from nanovllm.control import DetokenizerStats
from nanovllm.messages import (
    Begin,
    Decoded,
    Finished,
    NewTokens,
    SchedulerToDetokenizer,
    TokenLogprobs,
    unpack_int64,
    unpack_list,
)
from nanovllm.services.detokenizer.decoding import TOKEN_BYTES, Decoding
from nanovllm.vocabulary import Vocabulary

# A frame holds so many outputs at most: after a reconnection all are sent anew.
OUTPUTS_A_FRAME = 512


class Detokenizer:
    """All outputs, by uid.

    Tokens that arrive twice are cut. Tokens of an older attempt, or after a gap, are dropped. A
    newer attempt replaces an older one, also of another engine.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._outputs: dict[int, Decoding] = {}
        self._unsent: dict[int, Decoding] = {}
        self._tokens = 0

    def take(self, message: SchedulerToDetokenizer, engine: int = 0) -> None:
        """A message of this engine's scheduler."""
        if isinstance(message, NewTokens):
            self._new_tokens(message)
        elif isinstance(message, Begin):
            self._begin(message, engine)
        elif isinstance(message, Finished):
            output = self._outputs.get(message.uid)
            if output is not None and output.attempt == message.attempt and not output.ended:
                output.finish(message.reason, message.completion_tokens, message.timings)
                self._note(message.uid, output)
        else:
            output = self._outputs.get(message.uid)
            if output is not None and output.attempt <= message.attempt:
                del self._outputs[message.uid]
                self._unsent.pop(message.uid, None)

    def forget(self, engine: int = 0) -> None:
        """The connection to the engine's scheduler is gone: the scheduler gives its sequences to
        another detokenizer, or begins them anew on the next connection."""
        for uid, output in list(self._outputs.items()):
            if output.engine == engine:
                del self._outputs[uid]
                self._unsent.pop(uid, None)

    def frame(self) -> list[Decoded]:
        """The next frame for the ingress: the new part of each output. Empty if all was sent. Call
        `sent` once the frame is sent."""
        return [output.decoded() for output in islice(self._unsent.values(), OUTPUTS_A_FRAME)]

    def sent(self, frame: list[Decoded]) -> None:
        """`frame` was sent. No message has been taken since it was made."""
        for decoded in frame:
            self._unsent.pop(decoded.uid).sent()

    def stats(self) -> DetokenizerStats:
        return DetokenizerStats(requests=len(self._outputs), tokens=self._tokens)

    def _begin(self, begin: Begin, engine: int) -> None:
        output = self._outputs.get(begin.uid)
        if output is None or begin.attempt > output.attempt:
            output = Decoding(begin, self._vocabulary, engine)
            self._outputs[begin.uid] = output
            self._unsent.pop(begin.uid, None)
            self._note(begin.uid, output)
        elif begin.attempt == output.attempt and not output.ended:
            output.update(begin)
            self._note(begin.uid, output)

    def _new_tokens(self, message: NewTokens) -> None:
        uids = unpack_int64(message.uids)
        attempts = unpack_list(message.attempts)
        offsets = unpack_list(message.offsets)
        token_ids = unpack_list(message.token_ids)
        logprobs: dict[int, TokenLogprobs] = {}
        if message.logprobs:
            rows = unpack_list(message.logprob_rows)
            logprobs = dict(zip(rows, message.logprobs, strict=True))
        outputs, unsent = self._outputs, self._unsent
        for row, uid in enumerate(uids):
            output = outputs.get(uid)
            if (
                output is None
                or output.attempt != attempts[row]
                or output.count != offsets[row]
                or output.ended
            ):
                continue
            raw = message.token_ids[row * TOKEN_BYTES : (row + 1) * TOKEN_BYTES]
            output.push(token_ids[row], raw, logprobs.get(row))
            unsent[uid] = output
            self._tokens += 1

    def _note(self, uid: int, output: Decoding) -> None:
        if output.unsent:
            self._unsent[uid] = output
