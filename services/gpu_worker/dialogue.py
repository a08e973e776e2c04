"""Rank 0's dialogue with the scheduler: which plans to run, and which results to keep.

A dialogue knows no socket and no clock: the loop tells it what happened, and asks what to send.
"""

from __future__ import annotations

import logging
from collections import deque
from enum import Enum, auto

from nanovllm.messages import StepResult

log = logging.getLogger(__name__)


class DialoguePhase(Enum):
    DRAINING = auto()
    """Steps of a scheduler that is gone are still running."""
    WAITING = auto()
    """No step is running. Rank 0 announces the group until a `Reset` comes."""
    SERVING = auto()


class Dialogue:
    """The plans and results of one incarnation of the scheduler after another.

    A result may be lost with a connection. So the result of plan n is kept until plan n + depth
    comes, which the scheduler sends only after it has that result.

    Args:
        depth: how many plans the scheduler keeps in flight.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._in_flight = 0
        self._next = 0
        self._kept: deque[StepResult] = deque()
        self._unsent = 0
        self.phase = DialoguePhase.WAITING

    def reborn(self) -> None:
        """A new incarnation of the scheduler is there. It knows no earlier plan or result."""
        self._kept.clear()
        self._unsent = 0
        self.phase = DialoguePhase.DRAINING if self._in_flight else DialoguePhase.WAITING

    def reconnected(self) -> None:
        """The same incarnation is connected again. Results sent before may be lost."""
        self._unsent = len(self._kept)

    def accepts_reset(self, number: int) -> bool:
        """Whether to empty all slots now: not if this reset has been obeyed already."""
        obeyed = self.phase is DialoguePhase.SERVING and number < self._next
        if obeyed or self.phase is DialoguePhase.DRAINING:
            log.warning("dropped a reset to plan %d while %s", number, self._state())
            return False
        self._next = number
        self.phase = DialoguePhase.SERVING
        return True

    def accepts_plan(self, number: int) -> bool:
        """Whether to run this plan now: only if it is the next one. A copy is refused silently.

        Raises ValueError if an earlier plan is missing: its result would be waited for for ever.
        """
        if self.phase is not DialoguePhase.SERVING:
            log.warning("dropped plan %d while %s", number, self._state())
            return False
        if number > self._next:
            raise ValueError(f"plan {number} came, and not plan {self._next}")
        if number < self._next:
            return False
        self._next += 1
        self._in_flight += 1
        while self._kept and self._kept[0].number <= number - self._depth:
            self._kept.popleft()
        self._unsent = min(self._unsent, len(self._kept))
        return True

    def finished(self, result: StepResult) -> None:
        """Takes the result of the oldest step in flight."""
        self._in_flight -= 1
        if self.phase is DialoguePhase.DRAINING:
            if not self._in_flight:
                self.phase = DialoguePhase.WAITING
            return
        self._kept.append(result)
        self._unsent += 1

    @property
    def unsent(self) -> list[StepResult]:
        """Results to send, oldest first."""
        kept = list(self._kept)
        return kept[len(kept) - self._unsent :]

    def sent(self) -> None:
        """Notes that all of `unsent` was sent."""
        self._unsent = 0

    def _state(self) -> str:
        if self.phase is DialoguePhase.SERVING:
            return f"expecting plan {self._next}"
        return self.phase.name.lower()
