"""A raw client that checks what the protocol promises of every request with each message."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.support.raw_client import RawClient
from nanovllm.protocol import (
    Accepted,
    Delta,
    Error,
    Finish,
    Logprobs,
    Pong,
    PromptLogprobs,
    ServerMessage,
)

TIMEOUT_S = 120.0


@dataclass(eq=False)
class Answer:
    """What came for one request.

    Attributes:
        accepted: None where `stream` is false, and until it comes.
        start: the first offset; None while there is no output.
        answer_at: the characters of `text` before the answer, once that is told.
        deltas: how many came.
        end: its last message.
    """

    id: str
    stream: bool
    accepted: Accepted | None = None
    start: int | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    answer_at: int | None = None
    logprobs: Logprobs = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    deltas: int = 0
    end: Finish | Error | None = None

    @property
    def finish(self) -> Finish:
        assert isinstance(self.end, Finish), self.end
        return self.end

    @property
    def error(self) -> Error:
        assert isinstance(self.end, Error), self.end
        return self.end

    @property
    def seed(self) -> int:
        """The seed that was told."""
        if self.accepted is not None:
            return self.accepted.seed
        assert isinstance(self.finish.seed, int)
        return self.finish.seed

    def take(self, message: Accepted | Delta | Finish | Error) -> None:
        """The next message; AssertionError if it breaks the protocol."""
        assert self.end is None, f"{message} after {self.end}"
        if isinstance(message, Accepted):
            assert self.accepted is None
            assert self.stream
            self.accepted = message
        elif isinstance(message, Delta):
            assert self.accepted is not None, "output of what was not accepted"
            self._add(message)
        else:
            self.end = message
            if isinstance(message, Finish) and not self.stream:
                assert isinstance(message.text, str)
                assert isinstance(message.token_ids, list)
                self.text, self.token_ids = message.text, message.token_ids
                self.logprobs = message.logprobs or []
                if isinstance(message.prompt_logprobs, list):
                    self.prompt_logprobs = message.prompt_logprobs
                if isinstance(message.answer_at, int):
                    self.answer_at = message.answer_at

    def _add(self, delta: Delta) -> None:
        if self.start is None:
            self.start = delta.offset
        assert delta.offset == self.start + len(self.token_ids), "a gap or a repeat"
        assert delta.token_ids or delta.text
        if isinstance(delta.prompt_logprobs, list):
            assert not self.token_ids, "after the first delta"
            self.prompt_logprobs = delta.prompt_logprobs
        if isinstance(delta.answer_at, int):
            assert self.answer_at is None, "told twice"
            assert 0 <= delta.answer_at <= len(delta.text)
            self.answer_at = len(self.text) + delta.answer_at
        self.token_ids += delta.token_ids
        self.text += delta.text
        self.deltas += 1
        if delta.logprobs:
            assert len(delta.logprobs) == len(delta.token_ids)
            self.logprobs += delta.logprobs


class Wire(RawClient):
    """One connection; the options are those of its socket.

    Attributes:
        answers: of every request, by its id.
        refused: errors that ended no request of ours: those without an id, and duplicates.
        pongs: in the order in which they came.
    """

    def __init__(self, endpoint: str, **options: int) -> None:
        super().__init__(endpoint, **options)
        self._ids = map(str, itertools.count())
        self.answers: dict[str, Answer] = {}
        self.refused: list[Error] = []
        self.pongs: list[Pong] = []

    def ask(self, *, id: str | None = None, **keys: Any) -> Answer:
        """Sends a `generate`; returns where its answer will be."""
        return self.ask_all([keys if id is None else {"id": id, **keys}])[0]

    def ask_all(self, requests: Iterable[dict[str, Any]]) -> list[Answer]:
        """Sends one `generate` for each."""
        messages: list[dict[str, Any]] = []
        answers: list[Answer] = []
        for keys in requests:
            message = {"type": "generate", "id": next(self._ids), **keys}
            messages.append(message)
            answers.append(Answer(message["id"], keys.get("stream", True)))
        self.answers |= {answer.id: answer for answer in answers}
        self.say(*messages)
        return answers

    def run(self, *requests: dict[str, Any]) -> list[Answer]:
        """Sends one `generate` for each; the answers, once all have ended."""
        answers = self.ask_all(requests)
        self.results(*answers)
        return answers

    def abort(self, *answers: Answer) -> None:
        self.say(*({"type": "abort", "id": answer.id} for answer in answers))

    def ping(self) -> Pong:
        before = len(self.pongs)
        self.say({"type": "ping"})
        self.until(lambda: len(self.pongs) > before)
        return self.pongs[-1]

    def results(self, *answers: Answer) -> None:
        """Waits for the end of each."""
        self.until(lambda: all(answer.end is not None for answer in answers))

    def until(self, condition: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> None:
        """Reads until `condition` holds. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0:
                open_ones = [a for a in self.answers.values() if a.end is None]
                raise TimeoutError(f"still open: {open_ones[:4]}; refused: {self.refused[:4]}")
            for message in self.receive(left):
                self._take(message)

    def _take(self, message: ServerMessage) -> None:
        if isinstance(message, Pong):
            self.pongs.append(message)
        elif message.id is None or (isinstance(message, Error) and _is_extra(message)):
            assert isinstance(message, Error)
            self.refused.append(message)
        else:
            self.answers[message.id].take(message)


def _is_extra(error: Error) -> bool:
    """Whether it concerns the refused message alone, not the request with that id."""
    return error.code == "duplicate_id"
