"""All outputs that one detokenizer decodes: the scheduler's messages in, deltas out."""

from __future__ import annotations

from itertools import islice

import numpy as np

from nanovllm.control import DetokenizerStats
from nanovllm.messages import (
    Begin,
    Delta,
    End,
    Finished,
    NewTokens,
    SchedulerToDetokenizer,
    TokenLogprobs,
    uid_epoch,
    unpack,
)
from nanovllm.services.detokenizer.output import TOKEN_BYTES, Output
from nanovllm.vocabulary import Vocabulary

# Deltas in one frame at most: after a reconnection each may hold a whole output.
DELTAS_A_FRAME = 512


class Detokenizer:
    """Every output known, by uid.

    What arrives twice is cut; what belongs to an older attempt, or leaves a gap, is dropped.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._outputs: dict[int, Output] = {}
        self._unsent: dict[int, Output] = {}
        self._tokens = 0

    def take(self, message: SchedulerToDetokenizer) -> None:
        if isinstance(message, NewTokens):
            self._new_tokens(message)
        elif isinstance(message, Begin):
            self._begin(message)
        elif isinstance(message, Finished):
            output = self._outputs.get(message.uid)
            if output is not None and output.attempt == message.attempt and not output.ended:
                output.finish(message.reason, message.completion_tokens)
                self._note(message.uid, output)
        elif isinstance(message, End):
            self._drop(message.uid)

    def scheduler_up(self) -> None:
        """A link to the scheduler was made: it begins anew all that it has for this detokenizer.
        What it ended, or gave to another, while the link was down must not stay here."""
        self._outputs.clear()
        self._unsent.clear()

    def ingress_up(self, incarnation: int) -> None:
        """The ingress is there, in this life: what it was sent may be lost, and the requests of
        its other lives are nobody's."""
        for uid, output in list(self._outputs.items()):
            if uid_epoch(uid) != incarnation:
                self._drop(uid)
            else:
                output.rewind()
                self._note(uid, output)

    def deltas(self) -> list[Delta]:
        """The next frame's: all that is new of each output. Empty when all was sent."""
        return [output.delta() for output in islice(self._unsent.values(), DELTAS_A_FRAME)]

    def sent(self, deltas: list[Delta]) -> None:
        """The `deltas`, made since the last message was taken, were sent."""
        for delta in deltas:
            self._unsent.pop(delta.uid).sent(delta)

    def stats(self) -> DetokenizerStats:
        return DetokenizerStats(requests=len(self._outputs), tokens=self._tokens)

    def _begin(self, begin: Begin) -> None:
        output = self._outputs.get(begin.uid)
        if output is None or begin.attempt > output.attempt:
            output = Output(begin, self._vocabulary)
            self._outputs[begin.uid] = output
            self._unsent.pop(begin.uid, None)
            self._note(begin.uid, output)
        elif begin.attempt == output.attempt and not output.ended:
            output.update(begin)
            self._note(begin.uid, output)

    def _new_tokens(self, message: NewTokens) -> None:
        uids = np.frombuffer(message.uids, dtype="<i8").tolist()
        attempts = unpack(message.attempts).tolist()
        offsets = unpack(message.offsets).tolist()
        token_ids = unpack(message.token_ids).tolist()
        logprobs: dict[int, TokenLogprobs] = {}
        if message.logprobs:
            rows = unpack(message.logprob_rows).tolist()
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

    def _note(self, uid: int, output: Output) -> None:
        if output.unsent:
            self._unsent[uid] = output

    def _drop(self, uid: int) -> None:
        self._outputs.pop(uid, None)
        self._unsent.pop(uid, None)
