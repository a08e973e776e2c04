"""What a tokenizer has in hand: requests to tokenize, and answers to send."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from nanovllm.control import TokenizerStats
from nanovllm.messages import Refused, Tokenize, Tokenized, TokenizerToIngress
from nanovllm.transport.links import one_frame


class TokenizeQueue:
    """Requests in order of arrival, and their answers. The ingress counts what is here, and gives
    it to another tokenizer when the link is lost.

    Args:
        encode: tokenizes a request.
        prepared: whether a request can be tokenized by now.
    """

    def __init__(
        self,
        encode: Callable[[Tokenize], Tokenized | Refused],
        prepared: Callable[[Tokenize], bool] = lambda _: True,
    ) -> None:
        self._encode = encode
        self._prepared = prepared
        self._requests: deque[Tokenize] = deque()
        self._answers: deque[TokenizerToIngress] = deque()
        self._tokenized = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to tokenize."""
        return not self._requests

    def add(self, request: Tokenize) -> None:
        self._requests.append(request)

    def forget(self) -> None:
        """The link to the ingress was made or lost: what was in hand was given to another."""
        self._requests.clear()
        self._answers.clear()

    def work(self) -> bool:
        """Tokenizes the request that has waited longest. Returns False if it has to wait still."""
        if not self._prepared(self._requests[0]):
            return False
        self._answers.append(self._encode(self._requests.popleft()))
        self._tokenized += 1
        return True

    def frame(self) -> list[TokenizerToIngress]:
        """The next frame for the ingress; empty if there is none. `sent` was sent."""
        return one_frame(self._answers, _size)

    def sent(self, frame: list[TokenizerToIngress]) -> None:
        for _ in frame:
            self._answers.popleft()

    def stats(self) -> TokenizerStats:
        queued = len(self._requests) + len(self._answers)
        return TokenizerStats(queued=queued, tokenized=self._tokenized)


def _size(answer: TokenizerToIngress) -> int:
    return len(answer.prompt) if isinstance(answer, Tokenized) else len(answer.message)
