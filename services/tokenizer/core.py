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
        check: begins to check the grammar of a request, with the answer that is due if the grammar
            can be served. `checked` takes the answer, out of order.
        prepared: whether a request can be tokenized by now.
    """

    def __init__(
        self,
        encode: Callable[[Tokenize], Tokenized | Refused],
        check: Callable[[Tokenize, Tokenized], None],
        prepared: Callable[[Tokenize], bool] = lambda _: True,
    ) -> None:
        self._encode = encode
        self._check = check
        self._prepared = prepared
        self._requests: deque[Tokenize] = deque()
        self._in_check: set[int] = set()  # uids
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
        self._in_check.clear()
        self._answers.clear()

    def work(self) -> bool:
        """Tokenizes the request that has waited longest. Returns False if it has to wait still."""
        if not self._prepared(self._requests[0]):
            return False
        request = self._requests.popleft()
        answer = self._encode(request)
        self._tokenized += 1
        if isinstance(answer, Tokenized) and answer.sampling.structured_outputs is not None:
            self._in_check.add(request.uid)
            self._check(request, answer)
        else:
            self._answers.append(answer)
        return True

    def checked(self, answer: Tokenized | Refused) -> None:
        """The check of a grammar has ended."""
        if answer.uid in self._in_check:
            self._in_check.remove(answer.uid)
            self._answers.append(answer)

    def frame(self) -> list[TokenizerToIngress]:
        """The next frame for the ingress; empty if there is none. `sent` was sent."""
        return one_frame(self._answers, _size)

    def sent(self, frame: list[TokenizerToIngress]) -> None:
        for _ in frame:
            self._answers.popleft()

    def stats(self) -> TokenizerStats:
        queued = len(self._requests) + len(self._in_check) + len(self._answers)
        return TokenizerStats(queued=queued, tokenized=self._tokenized)


def _size(answer: TokenizerToIngress) -> int:
    if isinstance(answer, Refused):
        return len(answer.message)
    asked = answer.sampling.structured_outputs
    return len(answer.prompt) + (0 if asked is None else asked.size)
