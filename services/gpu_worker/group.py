"""What rank 0 says to the other ranks. They have nothing to answer: they are told the same plans,
and live and die with it."""

from __future__ import annotations

from nanovllm.messages import Message, Reset, StepPlan


class Rendezvous(Message, tag="rendezvous"):
    """Where rank 0 awaits the others, to form a process group: a port of the loopback interface."""

    port: int


LeaderToFollower = Rendezvous | Reset | StepPlan


class GroupBroken(RuntimeError):
    """A rank of this group is gone, and so the group is."""
