"""The scheduler's side of its dialogue with a worker group: which plans are in flight."""

from __future__ import annotations

from collections import deque

from nanovllm.messages import Reset, SchedulerToWorker, StepResult
from nanovllm.services.scheduler.preparations import Preparations
from nanovllm.services.scheduler.steps import Step
from nanovllm.transport.links import Peer

# So many plans may be in flight, however long their steps take.
FEW = 3
# More plans may be in flight only while their steps together take the device less time than this: a
# new request waits for all of them.
SHORT_US = 2500


class WorkerGroup:
    """One worker group after another, and the plans in flight.

    A connection that ends may lose a plan. So a plan is kept until its result comes.

    Args:
        depth: how many plans may be in flight, beyond `FEW` only if their steps are short.
        preparations: the matchers that the group is asked for.

    Attributes:
        peer: rank 0 of the group that was sent a `Reset`; None before the first group.
        next_number: the number of the next plan. A new group does not start again at 0.
    """

    def __init__(self, depth: int, preparations: Preparations) -> None:
        self._depth = depth
        self._preparations = preparations
        self._connected = False
        self._reset = Reset(0)
        self._reset_unsent = False
        # Whether a result has come since the reset. If so, the group has obeyed the reset.
        self._heard = False
        self._in_flight: deque[Step] = deque()
        self._unsent = 0
        # The device's time for the latest step, and for all steps of the group.
        self._step_us = SHORT_US
        self._busy_us = 0
        self.peer: Peer | None = None
        self.next_number = 0

    @property
    def ready(self) -> bool:
        """Whether the group would run a plan now."""
        return self._connected

    @property
    def has_room(self) -> bool:
        """Whether one more plan may be in flight."""
        in_flight = len(self._in_flight)
        short = in_flight * self._step_us < SHORT_US
        return self.peer is not None and in_flight < self._depth and (in_flight < FEW or short)

    def begin(self, peer: Peer) -> None:
        """A new group waits for its reset: nothing is in flight."""
        self.peer = peer
        self._connected = True
        self._heard = False
        self._in_flight.clear()
        self._reset = Reset(self.next_number)
        self._reset_unsent = True
        self._unsent = 0
        self._step_us, self._busy_us = SHORT_US, 0

    def announced_again(self) -> None:
        """The group announces again that it waits for its reset. The reset may be lost."""
        if not self._heard:
            self._say_again()

    def up(self, peer: Peer) -> None:
        """A connection to a rank 0 was made. If it is this group's, all messages are sent again."""
        if peer == self.peer:
            self._connected = True
            self._say_again()

    def down(self, peer: Peer) -> None:
        if peer == self.peer:
            self._connected = False

    def launch(self, step: Step) -> None:
        self.next_number += 1
        self._in_flight.append(step)
        self._unsent += 1

    def commit(self, result: StepResult) -> Step | None:
        """The step of this result; None if the result was known already.

        Raises ValueError if it is not the next result: a missing one would be awaited for ever.
        """
        first = self.next_number - len(self._in_flight)
        if result.number < first:
            return None
        if result.number > first or not self._in_flight:
            awaited = list(range(first, self.next_number))
            raise ValueError(
                f"the result of plan {result.number} came; next are those of {awaited}"
            )
        self._heard = True
        self._step_us, self._busy_us = result.busy_us - self._busy_us, result.busy_us
        step = self._in_flight.popleft()
        self._unsent = min(self._unsent, len(self._in_flight))
        return step

    @property
    def unsent(self) -> list[SchedulerToWorker]:
        """The messages to send, in order."""
        preparing = self._preparations.has_news
        if not self._connected or not (self._unsent or self._reset_unsent or preparing):
            return []
        messages: list[SchedulerToWorker] = [self._reset] if self._reset_unsent else []
        if preparing:
            admitted = [a.matcher for step in self._in_flight for a in step.plan.admit]
            messages += self._preparations.unsent(n for n in admitted if n is not None)
        first = len(self._in_flight) - self._unsent
        messages.extend(self._in_flight[i].plan for i in range(first, len(self._in_flight)))
        return messages

    def sent(self) -> None:
        """All of `unsent` was sent."""
        self._reset_unsent = False
        self._unsent = 0
        self._preparations.sent()

    def _say_again(self) -> None:
        self._reset_unsent = not self._heard
        self._unsent = len(self._in_flight)
        self._preparations.say_again()
