"""Which requests are sent when, and what came of them: the core, which is told the time."""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgspec

from nanovllm.bench.arrivals import Arrivals
from nanovllm.bench.prompts import Conversation, Prompt
from nanovllm.client.results import RequestError
from nanovllm.protocol import Delta, Error, Finish, Generate, ServerMessage, Usage


class Record(msgspec.Struct):
    """One request. Times are in seconds since the measurement began. Only requests of conversations
    that were due since then are `measured`; those before warm up."""

    measured: bool
    due_s: float
    sent_s: float
    turn: int
    # When each output token came: with a delta, so that several may have come at the same time.
    arrived_s: array[float]
    ended_s: float | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    error: str | None = None  # its code
    message: str = ""  # the error's


class _Dialogue(NamedTuple):
    """A conversation at one of its turns. `said` is what its turns and answers were before."""

    conversation: Conversation
    measured: bool
    turn: int = 0
    said: Prompt = ""


class _Open(msgspec.Struct):
    """A request that has not ended."""

    record: Record
    dialogue: _Dialogue
    prompt: Prompt
    answer: list[Delta] | None  # kept where another turn follows


class Load:
    """All requests of one run.

    Args:
        arrivals: when conversations are due.
        conversations: those to measure, in order.
        begins_at: when the measurement begins, by the clock of `now`.
        warm_up: conversations of before; None: the same as `conversations`.
        requests: measure at most so many conversations.
        seconds: measure conversations that are due before.
        salt: of the prefix cache, which shares nothing among different ones. Requests that warm up
            have another.
    """

    def __init__(
        self,
        arrivals: Arrivals,
        conversations: Iterable[Conversation],
        begins_at: float,
        *,
        warm_up: Iterable[Conversation] | None = None,
        requests: int | None = None,
        seconds: float = math.inf,
        salt: str | None = None,
    ) -> None:
        self.begins_at = begins_at
        self.records: list[Record] = []
        self.tokens = 0  # that have come
        self.conversations = 0  # measured, and ended
        self._arrivals = arrivals
        self._conversations = iter(conversations)
        self._warm_up = self._conversations if warm_up is None else iter(warm_up)
        self._left = math.inf if requests is None else requests
        self._seconds = seconds
        self._salt = salt
        self._ids = itertools.count()
        self._open: dict[str, _Open] = {}
        self._next: list[tuple[float, _Dialogue]] = []  # further turns, and when they were due

    @property
    def running(self) -> int:
        """Requests that were sent and have not ended."""
        return len(self._open)

    def due_at(self, now: float) -> float:
        """When the next request is due, by the clock of `now`; infinity: none until one ends."""
        if self._next:
            return now
        due_s = self._arrivals.due_s(now - self.begins_at, self.running)
        return math.inf if self._is_over(due_s) else self.begins_at + due_s

    def over(self, now: float) -> bool:
        """Whether every request has ended and no other is due."""
        return not self._open and self.due_at(now) == math.inf

    def due(self, now: float) -> Iterator[Generate]:
        """The requests to send now, noted as sent at `now`."""
        now_s = now - self.begins_at
        while self._next:
            due_s, dialogue = self._next.pop()
            yield self._send(dialogue, due_s, now_s)
        while (due_s := self._arrivals.due_s(now_s, self.running)) <= now_s:
            if self._is_over(due_s):
                return
            conversation = next(self._conversations if due_s >= 0 else self._warm_up, None)
            if conversation is None:
                self._left = 0
                return
            self._left -= due_s >= 0
            self._arrivals.started()
            yield self._send(_Dialogue(conversation, due_s >= 0), due_s, now_s)

    def add(self, conversation: Conversation, now: float) -> Generate:
        """A request beside those that `arrivals` tells of."""
        now_s = now - self.begins_at
        return self._send(_Dialogue(conversation, now_s >= 0), now_s, now_s)

    def take(self, messages: Iterable[ServerMessage], now: float) -> None:
        """Notes what the ingress said, at `now`.

        Raises:
            RequestError: the ingress refused a message without saying which.
        """
        now_s = now - self.begins_at
        for message in messages:
            if isinstance(message, Delta):
                if (request := self._open.get(message.id)) is not None:
                    self._extend(request, message, now_s)
            elif isinstance(message, Finish | Error):
                if message.id is None:
                    raise RequestError(message.code, message.message)
                if (request := self._open.pop(message.id, None)) is not None:
                    self._end(request, message, now_s)

    def _extend(self, request: _Open, delta: Delta, now_s: float) -> None:
        tokens = delta.token_ids
        self.tokens += len(tokens)
        for _ in tokens:
            request.record.arrived_s.append(now_s)
        if request.answer is not None:
            request.answer.append(delta)

    def _end(self, request: _Open, message: Finish | Error, now_s: float) -> None:
        record = request.record
        record.ended_s = now_s
        if isinstance(message, Error):
            record.error, record.message = message.code, message.message
        else:
            record.finish_reason, record.usage = message.finish_reason, message.usage
            if request.answer is not None:
                self._next.append((now_s, _next_turn(request)))
                return
        self.conversations += record.measured

    def _is_over(self, due_s: float) -> bool:
        return self._left <= 0 or due_s >= self._seconds

    def _send(self, dialogue: _Dialogue, due_s: float, now_s: float) -> Generate:
        turn = dialogue.conversation[dialogue.turn]
        prompt: Any = turn.prompt
        if dialogue.said:
            prompt = dialogue.said + prompt
        record = Record(dialogue.measured, due_s, now_s, dialogue.turn, array("d"))
        self.records.append(record)
        request_id = str(next(self._ids))
        last = dialogue.turn + 1 == len(dialogue.conversation)
        self._open[request_id] = _Open(record, dialogue, prompt, None if last else [])
        values: dict[str, Any] = {_field(prompt): prompt}
        if self._salt is not None:
            values["cache_salt"] = self._salt if record.measured else f"{self._salt} warm-up"
        return Generate(id=request_id, sampling=turn.sampling, **values)


def _next_turn(request: _Open) -> _Dialogue:
    said: Any = request.prompt
    answer = request.answer or []
    if isinstance(said[0], dict):
        said = [*said, {"role": "assistant", "content": "".join(delta.text for delta in answer)}]
    else:
        said = [*said, *itertools.chain.from_iterable(delta.token_ids for delta in answer)]
    return request.dialogue._replace(turn=request.dialogue.turn + 1, said=said)


def _field(prompt: Prompt) -> str:
    """The field of `Generate` for it."""
    if isinstance(prompt, str):
        return "prompt"
    return "messages" if isinstance(prompt[0], dict) else "prompt_token_ids"
