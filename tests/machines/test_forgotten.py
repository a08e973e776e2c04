"""A machine that does not come back: the pipeline's side, over a real link."""

from __future__ import annotations

import time
from typing import Any

from nanovllm import __version__
from nanovllm.control import Forget, Join, Joined, Services, ServiceStatus, ToMachine
from nanovllm.launch.machines import FORGOTTEN_S, Machines
from tests.peer import FakePeer, Neighbourhood


class Main:
    """The supervisor of the pipeline: knows its machines, and does nothing for them."""

    def __init__(self, endpoint: str) -> None:
        self.machines = Machines(endpoint, Joined(0, b"", ""), None)

    @property
    def sockets(self) -> tuple[Any, ...]:
        return self.machines.sockets

    def take_in(self) -> None:
        for _ in self.machines.receive():
            pass

    @property
    def states(self) -> list[str]:
        return [status.state for status in self.machines.statuses]


def brings(number: int) -> list[ServiceStatus]:
    """Two engines."""
    return [
        ServiceStatus(role, 0, 100 * number + i, 1, "ready", None, 0.0, 0, 0.0, 0.0, None)
        for i in range(2)
        for role in ("scheduler", "gpu_worker")
    ]


def join(machine: FakePeer, name: str, number: int = 0) -> int:
    """Joins, and brings its engines; the machine's number."""
    machine.send(Join(__version__, name, number))
    given = machine.expect(Joined).number
    machine.send(Services(brings(given), []))
    return given


def test_a_machine_that_does_not_come_back_is_forgotten_and_its_engines_have_left() -> None:
    with Neighbourhood() as here:
        endpoint = f"ipc://{here.runtime_dir}/services.sock"
        main = Main(endpoint)
        here.players.append(main)
        stays = here.connects("machine", endpoint, list[ToMachine])
        goes = here.connects("another", endpoint, list[ToMachine])
        assert [join(stays, "stays"), join(goes, "goes")] == [1, 2]
        here.wait("both", lambda: main.states == ["ready"] * 8 or None)
        assert main.machines.forget(time.monotonic() + 2 * FORGOTTEN_S) == []
        goes.leave()
        here.wait("loss", lambda: main.states == ["ready"] * 4 + ["unreachable"] * 4 or None)
        now = time.monotonic()
        assert main.machines.forget(now + FORGOTTEN_S / 2) == []
        left = [Forget(engine) for engine in (200, 201)]
        assert main.machines.forget(now + FORGOTTEN_S) == left
        assert main.machines.forget(now + FORGOTTEN_S) == []
        assert main.states == ["ready"] * 4
        # It was only cut off, and is itself again.
        goes.come_back(reborn=False)
        assert join(goes, "goes", 2) == 2
        here.wait("return", lambda: main.states == ["ready"] * 8 or None)
        assert main.machines.forget(time.monotonic() + FORGOTTEN_S) == []
        here.players.remove(main)
        for machine in (stays, goes):
            machine.leave()
        main.machines.close()
