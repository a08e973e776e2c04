"""Where the time of one request goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from nanovllm.messages import Timings
from nanovllm.tracing import Span, TraceContext, child_of


class Phase(NamedTuple):
    """A part of a request's time. `attempt` is 0 before the first one, which has no `engine`."""

    name: str
    start_ns: int
    end_ns: int
    attempt: int
    engine: int


class Timeline:
    """The phases of one request, each from the end of the one before.

    They are tokenizer, queue (until there is a slot), prefill (until there is a token), decode, and
    detokenizer (from the last token until its text is here). An attempt that is lost ends in the
    phase that it was in. What a service reports are durations: machines have clocks of their own.
    What the detokenizer ends, at a stop string, has no phase detokenizer: decode goes on until its
    text is here.

    Args:
        clock: tells the time in ns.
        parent: where its spans belong; None if none are wanted.
        wanted: whether the client has asked for the phases.
    """

    def __init__(
        self, clock: Callable[[], int], parent: TraceContext | None, *, wanted: bool
    ) -> None:
        self._clock = clock
        self._parent = parent
        self.wanted = wanted
        self.phases: list[Phase] = []
        self._began = self._at = clock()
        self._tokenized = False
        self._attempt = self._engine = self._given_at = 0
        self._timings: Timings | None = None  # of this attempt, once it has a token
        self._ended = False

    def tokenized(self) -> None:
        self._tokenized = True
        self._until("tokenizer", self._clock())

    def given(self, attempt: int, engine: int) -> None:
        """This engine is given the request, as this attempt: an earlier one is lost."""
        if self._attempt:
            self._end_attempt(self._clock())
        self._attempt, self._engine = attempt, engine
        self._timings, self._given_at = None, self._clock()

    def decoded(self, timings: Timings) -> None:
        """This attempt has a token."""
        self._timings = timings

    def end(self) -> None:
        """The request is over."""
        if self._ended:
            return
        self._ended = True
        now = self._clock()
        if self._tokenized:
            self._end_attempt(now)
        else:
            self._until("tokenizer", now)

    @property
    def timings(self) -> list[tuple[str, int]]:
        """Each phase's name and µs."""
        return [(phase.name, (phase.end_ns - phase.start_ns) // 1000) for phase in self.phases]

    def spans(self, attributes: Mapping[str, str | int], error: str | None) -> list[Span]:
        """The span `ingress`, and one of each phase; none if none are wanted."""
        if self._parent is None:
            return []
        whole = child_of(self._parent)
        spans = [
            Span(
                *("ingress", whole, self._parent.span_id, self._began, self._at),
                attributes,
                error,
                True,
            )
        ]
        for name, start_ns, end_ns, attempt, engine in self.phases:
            named = {"nanovllm.attempt": attempt, "nanovllm.engine": engine} if attempt else {}
            spans.append(Span(name, child_of(whole), whole.span_id, start_ns, end_ns, named))
        return spans

    def _end_attempt(self, now: int) -> None:
        if self._timings is None:
            self._until("queue", now)
            return
        self._until("queue", min(now, self._given_at + self._timings.queue_us * 1000))
        self._until("prefill", min(now, self._at + self._timings.prefill_us * 1000))
        if (decode_us := self._timings.decode_us) is None:
            self._until("decode", now)
        else:
            self._until("decode", min(now, self._at + decode_us * 1000))
            self._until("detokenizer", now)

    def _until(self, name: str, end_ns: int) -> None:
        self.phases.append(Phase(name, self._at, end_ns, self._attempt, self._engine))
        self._at = end_ns
