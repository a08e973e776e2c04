"""The matchers that a worker group makes for sequences with a grammar, before these take slots."""

from __future__ import annotations

from collections.abc import Iterable

from nanovllm.messages import Keep, Prepare, Prepared, pack_int64
from nanovllm.services.scheduler.sequences import Sequence


class Preparations:
    """One matcher a sequence that waits. A connection that ends may lose a message: until a
    matcher is ready, it can be asked for again.

    Args:
        first: the first matcher's number. From there on no earlier scheduler gave numbers.

    Attributes:
        abandoned: whether this worker group may still make a matcher that is not needed.
    """

    def __init__(self, first: int) -> None:
        self._next = first
        # Sequences that wait, by their matchers' numbers; and what was not answered yet.
        self._sequences: dict[int, Sequence] = {}
        self._unanswered: dict[int, Prepare] = {}
        self._unsent: list[Prepare] = []
        self._some_dropped = False
        self.abandoned = False

    def begin(self, sequence: Sequence) -> None:
        """Asks for the matcher of a sequence that has a grammar and no slot."""
        outputs = sequence.submit.sampling.structured_outputs
        if outputs is None:
            raise ValueError(f"request {sequence.uid:x} has no grammar")
        self.drop(sequence)
        sequence.matcher = self._next
        sequence.awaits_matcher = True
        self._next += 1
        message = Prepare(
            sequence.matcher,
            outputs,
            sequence.output,
            sequence.submit.answer_marks,
            sequence.matcher_alone,
        )
        self._sequences[sequence.matcher] = sequence
        self._unanswered[sequence.matcher] = message
        self._unsent.append(message)

    def answered(self, message: Prepared) -> Sequence | None:
        """The sequence whose matcher it is, if the matcher is still needed."""
        if self._unanswered.pop(message.number, None) is None:
            return None
        sequence = self._sequences[message.number]
        sequence.awaits_matcher = False
        return sequence

    def admitted(self, sequence: Sequence) -> int | None:
        """The sequence takes a slot, with its matcher, whose number is returned."""
        number, sequence.matcher = sequence.matcher, None
        if number is not None:
            del self._sequences[number]
        return number

    def drop(self, sequence: Sequence) -> None:
        """The sequence needs its matcher no more."""
        number = self.admitted(sequence)
        if number is not None:
            self.abandoned |= self._unanswered.pop(number, None) is not None
            self._some_dropped = True

    def reset(self) -> None:
        """There is a new worker group, and no matcher."""
        for sequence in list(self._sequences.values()):
            self.admitted(sequence)
        self._unanswered.clear()
        self._unsent.clear()
        self._some_dropped = self.abandoned = False

    @property
    def in_hand(self) -> list[int]:
        """The requests whose matchers are being made."""
        return [self._sequences[number].uid for number in self._unanswered]

    @property
    def has_news(self) -> bool:
        return bool(self._unsent) or self._some_dropped

    def unsent(self, admitted: Iterable[int]) -> list[Keep | Prepare]:
        """The messages to send, in order.

        Args:
            admitted: the matchers of sequences that plans in flight admit.
        """
        messages: list[Keep | Prepare] = []
        if self._some_dropped:
            messages.append(Keep(pack_int64([*self._sequences, *admitted])))
        messages.extend(m for m in self._unsent if m.number in self._unanswered)
        return messages

    def sent(self) -> None:
        """All of `unsent` was sent."""
        self._unsent.clear()
        self._some_dropped = False

    def say_again(self) -> None:
        """Messages may be lost."""
        self._unsent = list(self._unanswered.values())
        self._some_dropped = True
