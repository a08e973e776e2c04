"""Rank 0's side of its dialogue with the scheduler: which plans to take, which results to keep.

No sockets and no clock: the loop tells it what happened, and asks what there is to say.
"""

from __future__ import annotations

import logging
from collections import deque
from enum import Enum, auto

from nanovllm.messages import StepResult

log = logging.getLogger(__name__)


class Phase(Enum):
    DRAINING = auto()
    """Steps of a scheduler that is gone are still running."""
    WAITING = auto()
    """Empty; announces itself until a `Reset` comes."""
    SERVING = auto()


class Session:
    """One life of the scheduler, as rank 0 sees it.

    Args:
        depth: plans that the scheduler keeps in flight. Plan n + depth is sent only after the
            result of plan n has arrived, so until then that result is kept: it may be lost with
            a connection.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._in_flight = 0
        self._next = 0
        self._kept: deque[StepResult] = deque()
        self._unsent = 0
        self.phase = Phase.WAITING

    def reborn(self) -> None:
        """The scheduler is there in a new life: it knows nothing of plans and results."""
        self._kept.clear()
        self._unsent = 0
        self.phase = Phase.DRAINING if self._in_flight else Phase.WAITING

    def reconnected(self) -> None:
        """The link was made anew: what was sent last may be lost."""
        self._unsent = len(self._kept)

    def accepts_reset(self, number: int) -> bool:
        """Whether to empty all slots now. A copy of a reset that was obeyed already is refused."""
        if self.phase is Phase.DRAINING or (self.phase is Phase.SERVING and number < self._next):
            log.warning("dropped a reset to plan %d while %s", number, self._state())
            return False
        self._next = number
        self.phase = Phase.SERVING
        return True

    def accepts_plan(self, number: int) -> bool:
        """Whether to run this plan now: it is the next one. Copies are refused silently."""
        if self.phase is not Phase.SERVING or number > self._next:
            log.warning("dropped plan %d while %s", number, self._state())
            return False
        if number < self._next:
            return False
        self._next += 1
        self._in_flight += 1
        while self._kept and self._kept[0].number <= number - self._depth:
            self._kept.popleft()
        self._unsent = min(self._unsent, len(self._kept))
        return True

    def finished(self, result: StepResult) -> None:
        """A step has ended; results come in the order of their plans."""
        self._in_flight -= 1
        if self.phase is Phase.DRAINING:
            if not self._in_flight:
                self.phase = Phase.WAITING
            return
        self._kept.append(result)
        self._unsent += 1

    @property
    def unsent(self) -> list[StepResult]:
        """Results to send, oldest first."""
        kept = list(self._kept)
        return kept[len(kept) - self._unsent :]

    def sent(self) -> None:
        """All that was unsent has been sent."""
        self._unsent = 0

    def _state(self) -> str:
        if self.phase is Phase.SERVING:
            return f"expecting plan {self._next}"
        return self.phase.name.lower()
