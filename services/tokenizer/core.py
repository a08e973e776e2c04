"""What a tokenizer has in hand: requests to encode, requests to submit, and replies."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from nanovllm.control import TokenizerStats
from nanovllm.messages import (
    HandedOn,
    IngressToTokenizer,
    Refused,
    Submit,
    Tokenize,
    TokenizerToIngress,
    uid_epoch,
)

Encode = Callable[[Tokenize], Submit | Refused]

# Requests in one frame at most: each may hold a long prompt.
SUBMITS_A_FRAME = 64


class Desk:
    """Requests in order of arrival, from the ingress to the scheduler.

    A request is in hand until the scheduler was sent it; only then is it handed on. A newer
    attempt takes the place of an older one.
    """

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._queue: dict[int, Tokenize] = {}
        self._submits: dict[int, Submit] = {}
        self._replies: list[TokenizerToIngress] = []
        self._tokenized = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to encode."""
        return not self._queue

    def take(self, message: IngressToTokenizer) -> None:
        if not isinstance(message, Tokenize):
            self._drop(message.uid)
            return
        held = self._queue.get(message.uid) or self._submits.get(message.uid)
        if held is None or message.attempt > held.attempt:
            self._submits.pop(message.uid, None)
            self._queue[message.uid] = message

    def ingress_up(self, incarnation: int) -> None:
        """The ingress is there, in this life: the requests of its other lives are nobody's."""
        for uid in [*self._queue, *self._submits]:
            if uid_epoch(uid) != incarnation:
                self._drop(uid)
        self._replies = [r for r in self._replies if uid_epoch(r.uid) == incarnation]

    def work(self) -> None:
        """Encodes the request that has waited longest."""
        uid = next(iter(self._queue))
        result = self._encode(self._queue.pop(uid))
        if isinstance(result, Refused):
            self._replies.append(result)
        else:
            self._submits[uid] = result
            self._tokenized += 1

    def submits(self) -> list[Submit]:
        """The next frame to the scheduler; empty when all was sent."""
        return list(islice(self._submits.values(), SUBMITS_A_FRAME))

    def submitted(self, submits: list[Submit], scheduler: int) -> None:
        """`submits` were sent: they are the scheduler's now, in this life of it."""
        for submit in submits:
            del self._submits[submit.uid]
            prompt_tokens = len(submit.prompt) // 4
            self._replies.append(HandedOn(submit.uid, submit.attempt, prompt_tokens, scheduler))

    def replies(self) -> list[TokenizerToIngress]:
        """What the ingress is to be told; empty when all was sent."""
        return self._replies

    def replied(self) -> None:
        """The replies were sent."""
        self._replies = []

    def stats(self) -> TokenizerStats:
        return TokenizerStats(
            queued=len(self._queue) + len(self._submits), tokenized=self._tokenized
        )

    def _drop(self, uid: int) -> None:
        self._queue.pop(uid, None)
        self._submits.pop(uid, None)
