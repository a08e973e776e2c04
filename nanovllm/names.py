"""What services are called."""

from __future__ import annotations

import msgspec

ENGINE_ROLES = ("scheduler", "gpu_worker")
# The services of the n-th machine that has joined are numbered from n times this on.
NUMBERS_OF_A_MACHINE = 100


def first_of(machine: int) -> int:
    """The number of the first service, or engine, of a machine."""
    return machine * NUMBERS_OF_A_MACHINE


class ServiceId(msgspec.Struct, frozen=True, array_like=True):
    """Names a service, whatever process runs it. The index of a gpu_worker is its rank in its
    engine; the index of a scheduler is 0. A service that belongs to no engine has engine 0."""

    role: str
    index: int = 0
    engine: int = 0

    @property
    def number(self) -> int:
        """Which of its role, or whose engine's."""
        return self.engine if self.role in ENGINE_ROLES else self.index

    @property
    def machine(self) -> int:
        """The number of the machine that it runs on: 0 is the pipeline's own."""
        return self.number // NUMBERS_OF_A_MACHINE

    def __str__(self) -> str:
        if self.role == "scheduler":
            return f"scheduler {self.engine}"
        if self.role == "gpu_worker":
            return f"gpu_worker {self.engine}.{self.index}"
        return f"{self.role} {self.index}"
